import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vockit
from resist.cli import main
from resist.data.sampler import Sampler
from resist.data.voc import load_voc
from resist.errors import UserError
from resist.job import Job, build_seeded
from resist.models import build
from resist.models.faster_rcnn import build_detector, dense_pass, sections
from resist.planning.strategy import local_sgd, resist
from resist.runs.config import MachineConfig, NetworkConfig, OptimizationConfig, TrainConfig
from resist.runs.directory import Run
from resist.runs.model_file import FILE, save_full
from resist.subnet.chains import choose_chains, find_chains
from resist.subnet.network import tensors_of
from resist.subnet.scaling import scale_branches
from resist.sync.local import Local
from resist.tasks import image_shape, network_builder, open_task
from resist.tasks.backbone import BackboneInit
from resist.tasks.detection import Detection, image_transform
from resist.training.trainer import Trainer, make_sampler

SMALL = NetworkConfig(data="voc2007", model_args=("depths=1,1,5,1", "width=4"), image_size=36, data_workers=0)
ARGUMENTS = [
    "--data", "voc2007", "--model-args", "depths=1,1,5,1", "width=4", "--image-size", "36",
    "--workers", "2", "--min-depth", "0", "--batch-size", "2", "--local-steps", "2", "--device", "cpu",
    "--data-workers", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: a test that changes files draws its own."""
    root = tmp_path_factory.mktemp("kit")
    vockit.draw(root)
    return root


@pytest.fixture(scope="module")
def task(kit: Path) -> Detection:
    found = open_task(replace(SMALL, data_dir=kit), download=False)
    assert isinstance(found, Detection)
    return found


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def trainers_of(task: Detection, job: Job, config: TrainConfig) -> list[Trainer]:
    return [
        Trainer(config, worker, task, make_sampler(config, task.num_images, worker.index)) for worker in job.workers
    ]


CONFIG = TrainConfig(network=SMALL, optimization=OptimizationConfig(batch_size=2, lr=0.01))


def trained(
    task: Detection, steps: int, *, config: TrainConfig = CONFIG, batchnorm: str = "average"
) -> tuple[Job, list[float]]:
    """A job of two workers in this process after some steps, and the losses."""
    job = Job(task.network, resist(2, 2, min_depth=0), batchnorm=batchnorm, channels_last=config.machine.channels_last)
    trainers, losses = trainers_of(task, job, config), []
    for step in range(steps):
        losses += [float(trainer.step(step, 0.01)) for trainer in trainers]
        job.step(*(trainer.optimizer for trainer in trainers))
    return job, losses


@pytest.mark.parametrize("blocks", [(1, 1, 3, 1), (3, 4, 23, 3), (2, 2, 9, 2)])
def test_the_chain_is_the_backbones_and_never_the_necks(blocks: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = network_builder(replace(SMALL, model_args=(f"depths={','.join(map(str, blocks))}", "width=4")))()
    assert choose_chains(model)[0].name == f"backbone.body.layer3:1-{blocks[2] - 1}"
    assert all(chain.container.startswith("backbone.body.") for chain in find_chains(model))


def test_splitting_and_folding_give_the_network_back(task) -> None:
    """Conservation, bit for bit, with the real detector: whatever round, every weight is where it was."""
    full = tensors_of(build_seeded(task.network, 0))
    job = Job(task.network, resist(2, 1, min_depth=0), batchnorm="average", scale=1.0)
    for _ in range(3):
        job.synchronize()
        found = job.full_model()
        assert found is not None
        for name, tensor in tensors_of(found).items():
            assert torch.equal(tensor, full[name]), name


def test_steps_depend_on_seed_worker_and_step_alone(task) -> None:
    """The detector draws anchors and regions by chance: by the batch's, whatever torch's own generator stands at."""
    torch.manual_seed(1)
    one, losses = trained(task, 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other, same = trained(task, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert losses == same
    for worker, reference in zip(one.workers, other.workers, strict=True):
        assert torch.equal(worker.subnet.flat, reference.subnet.flat)
    assert len(set(losses)) == len(losses)


def test_every_weight_is_trained(task) -> None:
    job, _ = trained(task, 2)
    fresh = tensors_of(build_seeded(task.network, 0))
    full = job.full_model()
    assert full is not None
    assert [n for n, t in full.named_parameters() if torch.equal(t, fresh[n])] == []


def test_a_batch_in_parts_is_the_batch(task) -> None:
    batch = task.batches(Sampler(task.num_images, batch_size=4, seed=0, worker=0, workers=1)).batch(0)
    for parts in (1, 2, 4):
        split = task.split(batch, parts)
        assert [len(images) for images, _, _ in split] == [4 // parts] * parts
        for part_index in range(3):
            joined = [one for part in split for one in part[part_index]]
            assert all(a is b for a, b in zip(joined, batch[part_index], strict=True))
    whole, losses = trained(task, 1, config=replace(CONFIG, optimization=OptimizationConfig(batch_size=4)))
    del whole
    parts_config = replace(CONFIG, optimization=OptimizationConfig(batch_size=4, grad_accum_steps=2))
    assert trained(task, 1, config=parts_config)[1] == pytest.approx(losses, rel=0.2)  # other regions are drawn


@pytest.mark.slow
def test_autocast_keeps_boxes_in_float32(task) -> None:
    """bfloat16 has 8 bits: a box at pixel 500 would be known to 2 pixels."""
    model = build_seeded(task.network, 0).eval()
    image = task.held_out[0, 0][0].float() / 255
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features = model.backbone(image[None, :, :32, :32])
        found = model([image])[0]
    assert {level.dtype for level in features.values()} == {torch.float32}
    assert (found["boxes"].dtype, found["scores"].dtype) == (torch.float32, torch.float32)
    precise = replace(CONFIG, machine=MachineConfig(precision="bf16"))
    assert trained(task, 2, config=precise)[1] == pytest.approx(trained(task, 2)[1], rel=0.1)


@pytest.mark.slow
def test_channels_last_changes_nothing_but_the_layout(task) -> None:
    # Not as narrow as the others: on the CPU, torch 2.14 writes beyond its memory for a plain network of 4 channels.
    wide = replace(task, build=network_builder(replace(SMALL, model_args=("depths=1,1,5,1", "width=16"))))
    last = replace(CONFIG, machine=MachineConfig(channels_last=True))
    assert trained(wide, 2, config=last)[1] == pytest.approx(trained(wide, 2)[1], rel=1e-3)


@pytest.mark.parametrize("batchnorm", ["average", "recalibrate", "batch"])
def test_every_way_with_batchnorm_ends_in_a_network_that_can_be_tested(task, batchnorm: str) -> None:
    job, _ = trained(task, 2, batchnorm=batchnorm)
    averaged = {n: t.clone() for n, t in tensors_of(job.workers[0].subnet.model).items() if n.endswith("running_mean")}
    full = job.full_model(task.calibration(0))
    assert full is not None
    scores = task.test(full)
    assert list(scores) == ["AP50 (11 points)", "AP50 (area)"]
    assert all(0 <= score <= 1 for score in scores.values())
    name = "backbone.norms.layer4.running_mean"
    if batchnorm == "batch":
        assert not averaged
    else:
        assert torch.equal(averaged[name], full.get_buffer(name)) == (batchnorm == "average")


def test_statistics_are_estimated_on_what_the_network_sees_in_training(task) -> None:
    """The tensor of `calibration` is, number for number, what the detector's own transform makes of the photographs."""
    model = build_seeded(task.network, 0)
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stream = task.batches(Sampler(task.num_images, batch_size=4, seed=5, worker=-1, workers=1))
    task.loss(model, stream.batch(0))
    torch.testing.assert_close(next(iter(task.calibration(5))), seen[0])


class Oracle(nn.Module):
    """A network whose detections are the true objects."""

    def __init__(self, task: Detection, shift: float = 0.0) -> None:
        super().__init__()
        self.items = [task.held_out[i, 0] for i in range(len(task.held_out))]
        self.shift = shift

    def forward(self, images: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        detections = []
        for image in images:
            _, boxes, labels, *_ = next(i for i in self.items if torch.equal(i[0].float() / 255, image))
            detections.append({"boxes": boxes + self.shift, "labels": labels, "scores": torch.ones(len(labels))})
        return detections


def test_true_detections_score_100_percent(task) -> None:
    assert task.test(Oracle(task)) == {"AP50 (11 points)": 1.0, "AP50 (area)": 1.0}
    assert task.test(Oracle(task, shift=30.0)) == {"AP50 (11 points)": 0.0, "AP50 (area)": 0.0}


def test_the_years_own_measure_comes_first(tmp_path) -> None:
    vockit.draw(tmp_path)
    (tmp_path / "VOCdevkit" / "VOC2007").rename(tmp_path / "VOCdevkit" / "VOC2012")
    config = replace(SMALL, data="voc2012", data_dir=tmp_path, splits=("trainval", "test"))
    assert list(Detection.open(config).scores) == ["AP50 (area)", "AP50 (11 points)"]


# A backbone that starts from a classification run


def classification_run(path: Path, *, batchnorm: str = "average", **network: Any) -> Any:
    """A finished run of ours with weights that are all different from fresh ones; its scaled full network."""
    part = NetworkConfig(**{"model_args": ("depths=1,1,5,1", "width=4"), **network})
    model = build_seeded(network_builder(part), 7).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    if batchnorm == "batch":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = module.running_var = module.num_batches_tracked = None
    chains = choose_chains(model)
    Run(path, TrainConfig(network=part)).close()
    save_full(model, chains, [0.5], path / FILE)
    scale_branches(model, chains, [0.5])
    return model


@pytest.mark.parametrize("model", ["preact_small", "preact_resnet50_imagenet"])
def test_the_features_are_those_of_the_run(task, tmp_path, model: str) -> None:
    """Its scale is in the weights: every section gives what it gave in the run's scaled full network."""
    task = replace(task, build=network_builder(replace(SMALL, model=model)))
    classifier = classification_run(tmp_path / "run", model=model)
    started = replace(task, start=BackboneInit.read(tmp_path / "run"))
    detector = build_seeded(started.network, 0).eval()
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for (name, ours), (_, expected) in zip(
            sections(detector.backbone.body, images), sections(classifier, images), strict=True
        ):
            torch.testing.assert_close(ours, expected, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(detector.backbone.norms["layer4"].running_mean, classifier.norm.running_mean)
    fresh = build_seeded(task.network, 0)
    torch.testing.assert_close(detector.rpn.head.cls_logits.weight, fresh.rpn.head.cls_logits.weight)


@pytest.mark.parametrize("more", [{"model": "preact_resnet101"}, {"batchnorm": "batch"}])
def test_runs_without_a_last_norm_or_statistics_serve_too(task, tmp_path, more) -> None:
    classification_run(tmp_path / "run", **more)
    network = replace(SMALL, model=more.get("model", SMALL.model))
    replace(task, build=network_builder(network), start=BackboneInit.read(tmp_path / "run")).network()


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        (
            {"model_args": ("depths=1,1,5,1", "width=8")},
            "conv1.weight differs; give the options of that run, --model preact_small --model-args depths=1,1,5,1 w",
        ),
        (
            {"model_args": ("width=4", "depths=1,1,7,1", "final_norm=true")},
            "options of that run, --model preact_small --model-args width=4 depths=1,1,7,1, and no",
        ),
        (
            {"model_args": ("depths=1,1,3,1",)},
            "options of that run, --model preact_small --model-args depths=1,1,3,1, and no",
        ),
    ],
)
def test_another_network_is_refused_in_one_line(capsys, kit, tmp_path, network, complaint: str) -> None:
    classification_run(tmp_path / "run", **network)
    out = tmp_path / "new"
    status, _, err = cli(
        capsys, "train", *ARGUMENTS, "--data-dir", str(kit), "--init-from", str(tmp_path / "run"), "--out", str(out)
    )
    assert (status, err.count("\n")) == (2, 1)
    assert complaint in err
    assert not out.exists()


# The command line


@pytest.mark.slow
def test_train_evaluate_and_go_on(capsys, tmp_path) -> None:
    """Also without the run that the backbone started from, which is not needed any more."""
    vockit.draw(tmp_path)
    classification_run(tmp_path / "start")
    out = tmp_path / "run"
    common = ["--data-dir", str(tmp_path), "--processes", "1", "--out", str(out), "--num-evals", "1"]
    status, text, err = cli(
        capsys, "train", *ARGUMENTS, *common, "--epochs", "4", "--until", "rounds=2",
        "--init-from", str(tmp_path / "start"),
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "chain backbone.body.layer3:1-4: 4 blocks, the workers hold 2 2" in text
    assert "test AP50 (11 points)" in text
    assert "accuracy" not in text
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["round"] == 2
    assert list(record["scores"]) == ["AP50 (11 points)", "AP50 (area)"]
    assert record["accuracy"] == record["scores"]["AP50 (11 points)"]
    (tmp_path / "start").rename(tmp_path / "gone")
    status, text, _ = cli(capsys, "evaluate", str(out), "--device", "cpu")
    assert status == 0
    values = record["scores"].values()
    assert text == "".join(f"test {n} {100 * v:.2f} %\n" for n, v in zip(record["scores"], values, strict=True))
    status, _, err = cli(capsys, "train", "--resume", str(out))
    assert (status, err) == (0, "")
    rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rounds == [1, 2, 3]  # the budget is used up again


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "coco"], "--data coco is not known; choose one of"),
        (
            ["--data", "voc2007", "--model", "timm:resnet50"],
            "--data voc2007 needs a pre-activation ResNet as the detector's",
        ),
        (["--config", "splits.json"], "network.splits has no effect with --data digits"),
        (["--image-size", "64"], "--image-size has no effect with --data digits"),
        (["--init-from", "x"], "--init-from 'x' is not of the form timm:FILE"),
        ([*ARGUMENTS, "--model-args", "final_norm=true"], "--model-args final_norm has no effect with --data voc2007"),
        ([*ARGUMENTS, "--config", "smoothing.json"], "optimization.label_smoothing has no effect with --data voc2007"),
        ([*ARGUMENTS, "--init-from", "timm:x"], "--init-from timm:x has no effect with this network; give --model"),
        ([*ARGUMENTS, "--compile"], "--compile does not support detection"),
        ([*ARGUMENTS, "--init-from", "/nonexistent"], "/nonexistent is not a run directory"),
        ([*ARGUMENTS, "--batch-size", "5"], "--batch-size 5 is outside 1 to 4"),
        ([*ARGUMENTS, "--image-size", "4"], "--image-size 4 is too small; give at least 32"),
        ([*ARGUMENTS, "--config", "splits.json"], "other.txt: not found; give network.splits two of test, trainval"),
        ([*ARGUMENTS, "--workers", "5"], "--workers 5 exceeds the 4 blocks of chain backbone.body.layer3:1-4"),
    ],
)
def test_what_does_not_go_together_ends_in_one_line(
    capsys, kit, tmp_path, monkeypatch, arguments, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("splits.json").write_text('{"network": {"splits": ["trainval", "other"]}}')
    Path("smoothing.json").write_text('{"optimization": {"label_smoothing": 0.1}}')
    out = tmp_path / "run"
    status, _, err = cli(capsys, "train", "--data-dir", str(kit), "--processes", "1", *arguments, "--out", str(out))
    assert (status, err.count("\n")) == (2, 1)
    assert complaint in err
    assert not out.exists()


@pytest.mark.slow
def test_bad_files_end_the_run_or_are_counted(capsys, tmp_path) -> None:
    vockit.draw(tmp_path)
    root = tmp_path / "VOCdevkit" / "VOC2007"
    photograph, text = root / "JPEGImages" / "000002.jpg", root / "Annotations" / "000003.xml"
    whole = text.read_text()
    common = [*ARGUMENTS, "--data-dir", str(tmp_path), "--processes", "1", "--epochs", "1", "--num-evals", "1"]
    text.write_text(whole[:-30])
    status, _, err = cli(capsys, "train", *common, "--out", str(tmp_path / "a"))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"resist: {text}: not complete XML")
    photograph.write_bytes(photograph.read_bytes()[:-500])
    status, text_out, err = cli(capsys, "train", *common, "--skip-bad-files", "--out", str(tmp_path / "b"))
    assert (status, err) == (0, "")
    for split in ("trainval", "test"):
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        assert f"resist: {listed}: left out 2 photographs, first {photograph}: cannot be read as a picture" in text_out
    text.write_text(whole)  # what is only seen when it is decoded ends the run then
    status, _, err = cli(capsys, "train", *common, "--out", str(tmp_path / "c"))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"resist: {photograph}: cannot be read as a picture")


def test_training_that_diverges_says_so(capsys, kit, tmp_path) -> None:
    status, _, err = cli(
        capsys, "train", *ARGUMENTS, "--data-dir", str(kit), "--processes", "1", "--lr", "1e20", "--epochs", "4",
        "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert (status, err.count("\n")) == (2, 1)
    assert "training diverged" in err


def test_plan_and_cost_know_detectors(capsys) -> None:
    network = ["--data", "voc2007", "--image-size", "64", "--model-args", "depths=1,1,5,1"]
    status, text, _ = cli(capsys, "plan", *network, "--workers", "2", "--min-depth", "0", "--json")
    assert status == 0
    assert json.loads(text)["chains"][0]["name"] == "backbone.body.layer3:1-4"
    status, text, _ = cli(capsys, "cost", *network, "--workers", "2", "--batch-size", "2", "--json")
    assert status == 0
    assert {row["strategy"] for row in json.loads(text)["strategies"]} == {"resist", "local_sgd", "diloco", "ddp"}


def test_costs_count_every_weight() -> None:
    """What is counted reaches all of them, and a photograph's tensor has the shape that is assumed."""
    model = build_seeded(network_builder(SMALL), 0)
    assert image_shape(replace(SMALL, image_size=600)) == (3, 608, 800)
    dense_pass(model, torch.randn(1, *image_shape(SMALL))).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.slow
def test_a_backbone_for_photographs_gives_the_usual_levels(task) -> None:
    """Strides of 4 to 64 and anchors up to 512 pixels, as in torchvision; the chain is the paper's."""
    other = replace(
        task, build=network_builder(replace(SMALL, model="preact_resnet101_imagenet", model_args=("width=4",)))
    )
    with torch.device("meta"):
        model: Any = other.network()
    assert model.backbone.strides == (4, 8, 16, 32, 64)
    assert model.backbone.out_channels == 64  # of a width of 4; 256 of the usual 64
    assert [max(sizes) for sizes in model.rpn.anchor_generator.sizes] == [32, 64, 128, 256, 512]
    assert choose_chains(model)[0].name == "backbone.body.layer3:1-22"
    small = network_builder(replace(SMALL, model="preact_resnet50_imagenet", model_args=("depths=1,1,4,1", "width=4")))
    _, losses = trained(replace(task, build=small), 2)
    assert all(0 < loss < 20 for loss in losses)


def test_a_network_without_our_sections_is_refused() -> None:
    with pytest.raises(UserError, match=r"layer1 \.\. layer4.*Sequential has no forward_stem"):
        build_detector(nn.Sequential(nn.Conv2d(3, 4, 1)), 20, image_transform(36))
    with pytest.raises(UserError, match="num_classes=0"):
        build_detector(build("preact_small", num_classes=1), 0, image_transform(36))


def test_everyone_holds_everything_is_local_sgd(task) -> None:
    """The other strategies train a detector as well."""
    job = Job(task.network, local_sgd(2, 2), batchnorm="average", transport=Local(2))
    trainers = trainers_of(task, job, CONFIG)
    for step in range(2):
        losses = [float(trainer.step(step, 0.01)) for trainer in trainers]
        job.step(*(trainer.optimizer for trainer in trainers))
    assert all(0 < loss < 20 for loss in losses)
    assert torch.equal(job.workers[0].subnet.shared, job.workers[1].subnet.shared)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_two_workers_learn_four_photographs(commands, tmp_path, processes: int) -> None:
    """They learn, which needs correct boxes, labels, averages, scale and evaluation."""
    vockit.draw(tmp_path)
    arguments = [
        *ARGUMENTS,
        "--data-dir",
        str(tmp_path),
        "--model-args",
        "depths=1,1,5,1",
        "width=8",
        "--image-size",
        "48",
        "--local-steps",
        "10",
    ]
    schedule = ["--epochs", "30", "--lr", "0.02", "--lr-schedule", "cosine", "--lr-warmup-steps", "10"]
    arguments += ["--num-evals", "1", "--processes", str(processes), "--out", str(tmp_path / "run")]
    done = commands.run("train", *arguments, *schedule)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["accuracy"] > 0.6
    assert record["capacity"] == {"backbone.body.layer3:1-4": [2, 2]}


def test_photographs_of_a_set_are_those_of_the_command_line(kit) -> None:
    assert load_voc("voc2007", kit, image_size=36)[0].digest() in open_task(replace(SMALL, data_dir=kit)).digest()
