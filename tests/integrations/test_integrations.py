"""The callbacks, each in a real Trainer over two processes, against the same loop written by hand in one process."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import resist.integrations
from pool import Pool
from resist.errors import UserError
from resist.integrations import alone
from resist.job import Job
from resist.planning.strategy import Strategy
from resist.planning.strategy import resist as resist_strategy
from resist.subnet.scaling import scale_branches
from support import BLOCKS, batch, floats, sgd, tiny

STRATEGY = resist_strategy(2, 2, capacities=(4, 3))
STEPS = 5  # the last round is short


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@contextmanager
def torchrun() -> Iterator[None]:
    """The environment that torchrun gives a process, around what joined the others already."""
    names = {
        "RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(),
        "LOCAL_WORLD_SIZE": dist.get_world_size(), "MASTER_ADDR": "localhost", "MASTER_PORT": 29499,
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def by_hand(
    build: Callable[[], nn.Module], loss: Callable[..., Tensor], parts: int, clip: float, strategy: Strategy = STRATEGY
) -> dict[str, Tensor]:
    """The weights of the full network after STEPS steps of `parts` batches each, in one process."""
    job = Job(build, strategy, batchnorm="average")
    optimizers = [sgd(worker.model) for worker in job.workers]
    for step in range(STEPS):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            for part in range(parts):
                (loss(worker.model, *batch(worker.index, parts * step + part)) / parts).backward()
            nn.utils.clip_grad_norm_(worker.model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        job.step(*optimizers)
    return floats_of(job.full_model())


def floats_of(full: nn.Module | None) -> dict[str, Tensor]:
    return {} if full is None else floats(full)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def in_lightning(wrong: bool) -> Any:
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    from resist.integrations.lightning import ResIST

    class Module(LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, images_and_labels: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = images_and_labels
            return F.cross_entropy(self.net(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    with torchrun():
        job = Job(tiny, STRATEGY, batchnorm="average")
        data: Any = [batch(job.workers[0].index, step) for step in range(2 * STEPS)]
        options: dict[str, Any] = {
            "max_epochs": 1, "accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1,
            "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "use_distributed_sampler": False,
        }  # fmt: skip
        if wrong:
            options |= {"devices": 2, "strategy": "ddp"}
        trainer = Trainer(**options, callbacks=[ResIST(job)])
        try:
            trainer.fit(Module(job.model), DataLoader(data, batch_size=None))
        except UserError as error:
            return str(error)
        return floats_of(job.full_model()), job.round, job.step_index


@pytest.mark.slow
@needs("lightning")
def test_lightning(pool: Pool) -> None:
    """With accumulated and clipped gradients: as many steps as optimizer steps, and the weights of the plain loop."""
    (weights, *counts), (nothing, *others) = pool.run(2, in_lightning, False, timeout_s=100)
    assert counts == others == [3, STEPS]
    assert not nothing
    same(weights, by_hand(tiny, lambda model, images, labels: F.cross_entropy(model(images), labels), 2, 0.1))


def evaluated_in_lightning(folder: Path, kind: str) -> Any:
    """Validate, stop early, save at the end; what each process saw, and the full network of worker 0."""
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    from resist.integrations.lightning import ResIST

    class Module(LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = torch.compile(net, backend="eager") if kind == "compiled" else net
            self.seen: list[tuple[int, float]] = []

        def training_step(self, images_and_labels: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = images_and_labels
            assert len(tiny_chain(self.net)) == 3
            return F.cross_entropy(self.net(images), labels)

        def validation_step(self, images_and_labels: tuple[Tensor, Tensor]) -> None:
            images, labels = images_and_labels
            loss = F.cross_entropy(self.net(images), labels)
            self.log("val_loss", loss)
            self.seen.append((len(tiny_chain(self.net)), float(loss)))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    with torchrun():
        job = Job(tiny, resist_strategy(2, 2, capacities=(3, 3)), batchnorm="recalibrate")
        data: Any = [batch(job.workers[0].index, step) for step in range(4)]
        held_out: Any = [batch(9, step) for step in range(2)]

        def calibration() -> list[Tensor]:
            return [batch(8, step)[0] for step in range(2)]

        module = Module(job.model)
        callback = ResIST(job, None if kind == "no batches" else calibration, folder / "full.ckpt")
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=kind == "checkpoints",
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[callback],
            default_root_dir=folder,
        )  # fmt: skip
        loaders = [DataLoader(part, batch_size=None) for part in (data, held_out)]
        try:
            if kind == "another":
                trainer.fit(Module(tiny()), *loaders)
            trainer.fit(module, *loaders)
        except UserError as error:
            return str(error)
        full = job.full_model(calibration())
        return module.seen, None if full is None else (floats(full), full(batch(9, 0)[0]).detach())


def tiny_chain(net: nn.Module) -> list[nn.Module]:
    """The chain blocks of a network in the shape of `tiny`."""
    return list(getattr(net, "_orig_mod", net).get_submodule("layer3").children())[1:]


@pytest.mark.slow
@needs("lightning")
@pytest.mark.parametrize("kind", ["compiled", pytest.param("plain", marks=pytest.mark.nightly)])
def test_lightning_validates_and_saves_the_full_network(pool: Pool, tmp_path: Path, kind: str) -> None:
    (seen, (_, logits)), (others, nothing) = pool.run(2, evaluated_in_lightning, tmp_path, kind, timeout_s=150)
    assert nothing is None
    assert seen == others  # all processes find the same scores
    assert [blocks for blocks, _ in seen] == [BLOCKS] * 6  # a trial before training, and after both epochs
    assert seen[-2][1] == pytest.approx(float(F.cross_entropy(logits, batch(9, 0)[1])), rel=1e-6)
    content = torch.load(tmp_path / "full.ckpt", weights_only=True)
    assert content["scales"] == {}  # folded
    model = tiny().eval()
    model.load_state_dict({name.removeprefix("net."): value for name, value in content["state_dict"].items()})
    torch.testing.assert_close(model(batch(9, 0)[0]).detach(), logits, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@needs("lightning")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no batches", "the statistics of the full network's BatchNorm are estimated on training batches; give the"),
        (
            "checkpoints",
            "ModelCheckpoint would save this worker's sub-network; give Trainer enable_checkpointing=Fa",
        ),
        ("another", "the LightningModule does not have job.model as an attribute; build it around job.model"),
    ],
)
def test_what_lightning_would_do_with_another_network_is_refused(
    pool: Pool, tmp_path: Path, kind: str, message: str
) -> None:
    for found in pool.run(2, evaluated_in_lightning, tmp_path, kind, timeout_s=100):
        assert found.startswith(message)


@pytest.mark.slow
@needs("lightning")
def test_lightning_over_all_processes_is_refused(pool: Pool) -> None:
    for message in pool.run(2, in_lightning, True, timeout_s=100):
        assert message.startswith("this Trainer spans 2 processes and averages gradients itself; give it devices=1")


class WithLoss(nn.Module):
    """A network as Trainer likes it: its forward takes labels and gives the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def in_transformers(folder: Path, bf16: bool, wrong: bool) -> Any:
    from transformers import Trainer, TrainingArguments

    from resist.integrations.transformers import ResISTCallback, alone

    with torchrun():
        job = Job(WithLoss, STRATEGY, batchnorm="average")
        data: list[dict[str, Any]] = []
        for step in range(2 * STEPS):
            images, labels = batch(job.workers[0].index, step)
            data += [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]
        with nullcontext() if wrong else alone():
            arguments = TrainingArguments(
                str(folder), num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                max_grad_norm=0.1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, bf16=bf16,
                train_sampling_strategy="sequential", remove_unused_columns=False, logging_strategy="no",
            )  # fmt: skip
            optimizer = sgd(job.model)
            constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            given: Any = {"train_dataset": data, "optimizers": (optimizer, constant)}
            try:
                Trainer(job.model, arguments, callbacks=[ResISTCallback(job)], **given).train()
            except UserError as error:
                return str(error)
            return floats_of(full := job.full_model()), job.round, job.step_index, logits(full)


def logits(full: nn.Module | None) -> Tensor | None:
    if full is None:
        return None
    images, labels = batch(9, 0)
    with torch.no_grad():
        return full(images, labels)["logits"]


@pytest.mark.slow
@needs("transformers")
def test_transformers(pool: Pool, tmp_path: Path) -> None:
    """With accumulated and clipped gradients, as above."""
    (weights, *counts, _), (nothing, *others, _) = pool.run(2, in_transformers, tmp_path, False, False, timeout_s=100)
    assert counts == others == [3, STEPS]
    assert not nothing
    same(weights, by_hand(WithLoss, lambda model, images, labels: model(images, labels)["loss"], 2, 0.1))


def evaluated_in_transformers(folder: Path, kind: str) -> Any:
    """A transformer of Hugging Face's, evaluated and saved in every epoch."""
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    from resist.integrations.transformers import ResISTCallback, alone

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    def examples(worker: int, steps: int) -> list[dict[str, Any]]:
        batches = [batch(worker, step) for step in range(steps)]
        return [{"pixel_values": x.float(), "labels": y} for xs, ys in batches for x, y in zip(xs, ys, strict=True)]

    with torchrun():
        scale = 1.0 if kind == "no scale" else "inclusion"
        job = Job(lambda: ViTForImageClassification(config), resist_strategy(2, 2, capacities=(4, 3)), scale=scale)
        with alone():
            arguments = TrainingArguments(
                str(folder), num_train_epochs=2, per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
                use_cpu=True, remove_unused_columns=False, logging_strategy="no", eval_strategy="epoch",
                save_strategy="epoch", load_best_model_at_end=kind == "best",
            )  # fmt: skip
            data, held_out = examples(job.workers[0].index, 3), examples(9, 2)
            trainer = Trainer(job.model, arguments, train_dataset=data, eval_dataset=held_out)
            trainer.add_callback(ResISTCallback(job, None if kind == "no trainer" else trainer))
            try:
                trainer.train()
            except UserError as error:
                return str(error)
        full = job.full_model()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        if full is None:
            return losses, None, None
        images = torch.stack([example["pixel_values"] for example in held_out])
        labels = torch.stack([example["labels"] for example in held_out])
        with torch.no_grad():
            return losses, full(images).logits, float(full(images, labels=labels).loss)


@pytest.mark.slow
@needs("transformers")
@pytest.mark.parametrize("kind", ["scaled", pytest.param("no scale", marks=pytest.mark.nightly)])
def test_transformers_evaluates_and_saves_the_full_network(pool: Pool, tmp_path: Path, kind: str) -> None:
    from transformers import ViTForImageClassification

    from resist.integrations.transformers import apply_scales

    found, others = pool.run(2, evaluated_in_transformers, tmp_path, kind, timeout_s=150)
    (losses, logits, loss), (other_losses, nothing, _) = found, others
    assert nothing is None
    assert losses == other_losses
    assert len(losses) == 2
    assert losses[-1] == pytest.approx(loss, rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["full-3", "full-6"]
    images = torch.stack([x.float() for step in range(2) for x in batch(9, step)[0]])
    for folder in (tmp_path, tmp_path / "full-6"):
        loaded = ViTForImageClassification.from_pretrained(folder).eval()
        assert loaded.config.num_hidden_layers == BLOCKS
        if kind == "scaled":
            assert len(loaded.config.resist_scales) == BLOCKS
            apply_scales(loaded)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images).logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@needs("transformers")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no trainer", "Trainer would evaluate this worker's sub-network; give the callback the Trainer: trainer.add_"),
        ("best", "load_best_model_at_end=True would load a worker's sub-network; leave it out"),
    ],
)
def test_what_transformers_would_do_with_the_sub_network_is_refused(
    pool: Pool, tmp_path: Path, kind: str, message: str
) -> None:
    for found in pool.run(2, evaluated_in_transformers, tmp_path, kind, timeout_s=100):
        assert found.startswith(message)


def in_accelerate(hidden: bool) -> Any:
    """The loop of accelerate's users, around one worker."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.utils.data import DataLoader

    AcceleratorState._reset_state(reset_partial_state=True)  # of another test in this process
    with torchrun():
        job = Job(tiny, resist_strategy(2, 2, capacities=(3, 3)), batchnorm="average")
        batches = [batch(job.workers[0].index, step) for step in range(2 * STEPS)]
        data: Any = [item for images, labels in batches for item in zip(images, labels, strict=True)]
        with alone() if hidden else nullcontext():
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            loader = DataLoader(data, batch_size=4)
            model, optimizer, loader = accelerator.prepare(job.model, sgd(job.model), loader)
            for images, labels in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(images), labels))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    try:
                        job.step(optimizer)
                    except UserError as error:
                        return str(error)
        return floats_of(job.full_model()), job.round, job.step_index


@pytest.mark.slow
@needs("accelerate")
def test_accelerate_inside_a_worker(pool: Pool) -> None:
    (weights, *counts), (nothing, *others) = pool.run(2, in_accelerate, True, timeout_s=100)
    assert counts == others == [3, STEPS]
    assert not nothing
    strategy = resist_strategy(2, 2, capacities=(3, 3))
    same(weights, by_hand(tiny, lambda model, x, y: F.cross_entropy(model(x), y), 2, 0.1, strategy))


@pytest.mark.slow
@needs("accelerate")
def test_accelerate_over_all_processes_is_refused(pool: Pool) -> None:
    for message in pool.run(2, in_accelerate, False, timeout_s=100):
        assert message.startswith("accelerate spans 2 processes and averages gradients itself; create the Accelerator ")


@pytest.mark.slow
@needs("transformers")
def test_the_full_network_is_whole_after_accelerate_has_wrapped_a_forward(pool: Pool, tmp_path: Path) -> None:
    """For bf16 it replaces `forward` of the sub-network's instance. The full network's has to be its own."""
    (found, *_, answer), _ = pool.run(2, in_transformers, tmp_path, True, False, timeout_s=100)
    plain = WithLoss().eval()
    plain.load_state_dict(found, strict=False)
    job = Job(WithLoss, STRATEGY)
    scale_branches(plain, job.chains, job.scales)
    expected = logits(plain)
    assert expected is not None
    torch.testing.assert_close(answer.to(expected.dtype), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@needs("transformers")
def test_transformers_over_all_processes_is_refused(pool: Pool, tmp_path: Path) -> None:
    for message in pool.run(2, in_transformers, tmp_path, False, True, timeout_s=100):
        assert message.startswith("this Trainer spans 2 processes and 0 GPUs and averages gradients itself; create ")


def test_alone_hides_the_other_processes_and_brings_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "7")
    before = dict(os.environ)
    with alone():
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & os.environ.keys()
        assert os.environ["PATH"] == before["PATH"]
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_the_framework_one_line_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name, f"{name}.pytorch"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"resist.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"needs .*: pip install 'torch-resist\[{name}\]'$"):
        importlib.import_module(f"resist.integrations.{name}")


@pytest.mark.parametrize("file", sorted(Path(resist.integrations.__file__).parent.glob("*.py")), ids=lambda p: p.name)
def test_they_stay_small(file: Path) -> None:
    """A third of each is the description of how it is used."""
    assert len(file.read_text().splitlines()) < 160
