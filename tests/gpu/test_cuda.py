"""What only a GPU can show: `pytest -m cuda`, or the part `tests` of benchmarks/gpu.py.

The bodies also run on the CPU, where they show little, so that a first run on a GPU is likely to find faults of the
product instead of its own. Tests of two GPUs are skipped where there is one.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import resist
from pool import Pool
from resist.data import load
from resist.job import Job
from resist.models import PreActResNet
from resist.planning.strategy import Strategy
from resist.runs.config import MachineConfig, MethodConfig, OptimizationConfig, TrainConfig
from resist.subnet.randomness import seeded_rng
from resist.subnet.tensors import tensors_of
from resist.sync.distributed import connect
from resist.sync.local import Local
from resist.tasks import Classification
from resist.training.trainer import Trainer, make_sampler

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def needing(gpus: int) -> list[pytest.MarkDecorator]:
    reason = f"needs {'a GPU' if gpus == 1 else f'{gpus} GPUs'}, and torch finds {NUM_GPUS}"
    return [pytest.mark.cuda, pytest.mark.skipif(gpus > NUM_GPUS, reason=reason)]


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needing(1))])
TWO_DEVICES = pytest.mark.parametrize("device", [pytest.param("cuda", marks=needing(2))])


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in fp32 instead of TF32, and the same algorithm every time: losses then differ by rounding only."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


class Net(nn.Module):
    """A small pre-activation ResNet with a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.prelu = PreActResNet((1, 1, 5, 1), 10, width=4, final_norm=True), nn.PReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.prelu(self.body(images))


class Run:
    """A job whose workers this process hosts, and its losses. device: "cuda", or with a number."""

    def __init__(self, device: str, strategy: Strategy | None = None, **options: object) -> None:
        strategy = strategy or resist.resist(2, 3, capacities=2, optimizer_state="average")
        chosen = {"batchnorm": "average", "example": False, "device": device, **options}
        self.job = Job(Net, strategy, **chosen)  # type: ignore[arg-type]
        self.optimizers = [
            torch.optim.SGD(worker.model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
            for worker in self.job.workers
        ]
        self.models: list[nn.Module] = [worker.model for worker in self.job.workers]
        self.device = self.job.workers[0].subnet.device

    def train(self, steps: int, *, bf16: bool = False) -> list[float]:
        """Take steps, each on a batch of its worker and step."""
        losses: list[Tensor] = []
        for _ in range(steps):
            for worker, model, optimizer in zip(self.job.workers, self.models, self.optimizers, strict=True):
                images, labels = batch(worker.index, self.job.step_index)
                images, labels = images.to(self.device), labels.to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            self.job.step(*self.optimizers)
        return [float(loss) for loss in losses]

    def weights(self) -> dict[str, Tensor]:
        full = self.job.full_model()
        return {} if full is None else {name: t.detach().cpu().clone() for name, t in tensors_of(full).items()}


def batch(worker: int, step: int) -> tuple[Tensor, Tensor]:
    """Images (8, 3, 16, 16) and labels (8,) in CPU memory."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.randint(10, (8,), generator=generator)


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Make everything that waits for the GPU an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@DEVICES
def test_a_step_of_resist_train_does_not_wait_for_the_device(device: str, precision: str) -> None:
    config = TrainConfig(
        method=MethodConfig(workers=2, local_steps=10),
        optimization=OptimizationConfig(batch_size=4, lr=0.02),
        machine=MachineConfig(device=device, precision=precision),  # type: ignore[arg-type]
    )
    train_images, test_images = load("synthetic")
    task = Classification(Net, train_images, test_images).to(torch.device(device))
    job = Run(device, resist.resist(2, 10, capacities=2)).job
    trainers = [Trainer(config, w, task, make_sampler(config, task.num_images, w.index)) for w in job.workers]
    where = job.workers[0].subnet.device
    losses: list[Tensor] = []
    for step in range(4):
        # The first steps load libraries and make the state of the optimizer.
        with no_waiting(where) if step >= 2 else contextlib.nullcontext():
            for trainer in trainers:
                with seeded_rng(job.step_seed(trainer.index), where):
                    losses.append(trainer.step(step, 0.02))
            assert not job.step(*(trainer.optimizer for trainer in trainers))
    assert all(torch.isfinite(loss) for loss in losses)


@DEVICES
def test_losses_are_those_of_the_cpu(device: str) -> None:
    expected, run = Run("cpu").train(7), Run(device)
    assert run.train(7) == pytest.approx(expected, rel=1e-3)
    for worker, optimizer in zip(run.job.workers, run.optimizers, strict=True):
        for parameter in worker.model.parameters():
            assert parameter.device == run.device
            assert all(value.device == run.device for value in tensors_in_state(optimizer, parameter))


def tensors_in_state(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    return [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]


@DEVICES
def test_bf16_channels_last_and_compiled_stay_near_fp32(device: str) -> None:
    expected, run = Run(device).train(4), Run(device, channels_last=True)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in run.models[0].parameters() if p.dim() == 4)
    if device == "cuda":
        run.models = [torch.compile(model) for model in run.models]  # type: ignore[misc]
    assert run.train(4, bf16=True) == pytest.approx(expected, rel=0.05)


@DEVICES
def test_a_job_that_is_loaded_goes_on_as_the_one_that_was_saved(device: str, tmp_path: Path) -> None:
    whole = Run(device)
    whole.train(3)
    resist.save_checkpoint(tmp_path, whole.job)
    expected = whole.train(4)
    again = Run(device)
    resist.load_checkpoint(tmp_path, again.job, again.optimizers)
    for worker, optimizer in zip(again.job.workers, again.optimizers, strict=True):
        states = [tensors_in_state(optimizer, parameter) for parameter in worker.model.parameters()]
        assert all(state and all(value.device == again.device for value in state) for state in states)
    assert again.train(4) == pytest.approx(expected, rel=1e-4)


@DEVICES
def test_the_default_device_does_not_change_anything(device: str) -> None:
    expected = Run(device).train(4)
    train_images, _ = load("synthetic")
    sampler = make_sampler(TrainConfig(optimization=OptimizationConfig(batch_size=4)), len(train_images), 0)
    images, labels = train_images.to(device).loader(sampler).batch(3)
    with torch.device(device):
        again, again_labels = train_images.to(device).loader(sampler).batch(3)
        losses = Run(device).train(4)
    assert torch.equal(images, again)
    assert torch.equal(labels, again_labels)
    assert losses == pytest.approx(expected, rel=1e-4)


def weights_of_a_group(device: str) -> tuple[set[str], dict[str, Tensor]]:
    """Train in this process of a group. Returns the backends of its groups, and the network of worker 0's process."""
    backends: set[str] = set()

    def new_group(*arguments: object, backend: str, **options: object) -> object:
        backends.add(backend)
        return original(*arguments, backend=backend, **options)

    original = dist.new_group
    with patch.object(dist, "new_group", new_group):
        run = Run(device, transport=connect(2, device, 60.0))
    run.train(7)
    weights = run.weights()
    run.job.close()
    return backends, weights


def ddp_in_a_group(device: str) -> list[float]:
    transport = connect(2, device, 60.0, backend="gloo")
    run = Run(device, resist.ddp(2), transport=transport)
    losses = run.train(3)
    run.job.close()
    return losses


@pytest.mark.slow
@DEVICES
def test_two_processes_that_share_a_device_get_the_weights_of_one(device: str, pool: Pool) -> None:
    alone = Run(device, transport=Local(2))
    alone.train(7)
    expected = alone.weights()
    (backends, weights), _ = pool.run(2, weights_of_a_group, device if device == "cpu" else "cuda:0")
    assert backends == {"gloo"}
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    first = Run("cpu", resist.local_sgd(2, 50)).train(1)
    every = pool.run(2, ddp_in_a_group, device if device == "cpu" else "cuda:0")
    assert [losses[0] for losses in every] == pytest.approx(first, rel=1e-3)


@pytest.mark.slow
@TWO_DEVICES
def test_two_gpus_use_nccl_and_get_the_weights_of_one(device: str, pool: Pool) -> None:
    alone = Run("cuda:0", transport=Local(2))
    alone.train(7)
    expected = alone.weights()
    (backends, weights), _ = pool.run(2, weights_on_own_gpu)
    assert backends == {"gloo", "nccl"}  # control messages go by gloo
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def weights_on_own_gpu() -> tuple[set[str], dict[str, Tensor]]:
    return weights_of_a_group(f"cuda:{dist.get_rank()}")


def contexts_of_a_run(device: str, folder: Path) -> list[int]:
    """Train, save and load on one device; returns the GPUs on which this process has a context."""
    run = Run(device)
    run.train(3)
    resist.save_checkpoint(folder, run.job)
    resist.load_checkpoint(folder, run.job, run.optimizers)
    train_images, _ = load("synthetic")
    sampler = make_sampler(replace(TrainConfig(), optimization=OptimizationConfig(batch_size=4)), len(train_images), 0)
    train_images.to(device).loader(sampler).batch(0)
    if not torch.cuda.is_initialized():
        return []
    return [gpu for gpu in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(gpu)]


def test_a_run_on_the_cpu_opens_no_context(tmp_path: Path) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("another test of this process has used a GPU")
    assert contexts_of_a_run("cpu", tmp_path) == []


@TWO_DEVICES
def test_a_process_on_another_gpu_opens_no_context_on_the_first(device: str, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\n"
        "import test_cuda\n"
        f"print(test_cuda.contexts_of_a_run('{device}:1', Path({str(tmp_path)!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[1]"]
