"""Detection: batches, losses, statistics and scores of a small detector."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import vockit
from detectors import SMALL
from resist.blocks.chains import choose_chains, find_chains
from resist.data.sampler import Sampler
from resist.data.voc import load_voc
from resist.errors import UserError
from resist.job import Job, build_seeded
from resist.models import build
from resist.models.faster_rcnn import build_detector, dense_pass
from resist.planning.strategy import local_sgd, resist
from resist.runs.config import MachineConfig, OptimizationConfig, TrainConfig
from resist.subnet.tensors import tensors_of
from resist.sync.local import Local
from resist.tasks import detection, image_shape, network_builder, open_task
from resist.tasks.detection import Detection, image_transform
from resist.training.trainer import Trainer, make_sampler
from support import Shared
from two_gpus import Gpus

pytestmark = pytest.mark.slow


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


def test_regions_are_drawn_by_the_gpu_of_the_batch(task: Detection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the current one, which is another in a process that shares a machine."""
    gpus, drawn = Gpus(monkeypatch), list[list[int]]()

    def model(images: list[torch.Tensor], targets: object) -> dict[str, torch.Tensor]:
        drawn.append(list(gpus.seeds))
        return {"loss": images[0].sum()}

    batch = task.batches(Sampler(task.num_images, batch_size=2, seed=0, worker=0, workers=1)).batch(0)
    task.to("cuda:1").loss(model, batch)
    assert drawn[0][0] == 0
    assert drawn[0][1] != 0
    assert gpus.seeds == [0, 0]


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


def test_channels_last_changes_nothing_but_the_layout(task) -> None:
    # Not as narrow as the others: on the CPU, torch 2.14 writes beyond its memory for a plain network of 4 channels.
    wide = replace(task, build=network_builder(replace(SMALL, model_args=("depths=1,1,5,1", "width=16"))))
    last, plain = (replace(CONFIG, machine=MachineConfig(channels_last=on)) for on in (True, False))
    assert trained(wide, 2, config=last)[1] == pytest.approx(trained(wide, 2, config=plain)[1], rel=1e-3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_features_have_the_memory_format_of_the_weights(task, channels_last: bool) -> None:
    wide = replace(task, build=network_builder(replace(SMALL, model_args=("depths=1,1,3,1", "width=16"))))
    form, other = (torch.channels_last, torch.contiguous_format)[:: 1 if channels_last else -1]
    model, seen = build_seeded(wide.network, 0).to(memory_format=form), list[torch.Tensor]()
    for module in model.backbone.body.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    on_device = wide.to("cpu", channels_last=channels_last)
    stream = on_device.batches(Sampler(task.num_images, batch_size=2, seed=0, worker=0, workers=1))
    with torch.no_grad():
        on_device.loss(model, stream.batch(0))
    shown = [features for features in seen if features.shape[1] > 1 and features.shape[2] > 1]
    assert shown
    assert all(features.is_contiguous(memory_format=form) for features in shown)
    assert not any(features.is_contiguous(memory_format=other) for features in shown)


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


def test_shares_of_the_photographs_give_the_scores_of_all(task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "TEST_BATCH", 2)
    model, count = Oracle(task, shift=1.5), 2
    assert len(task.held_out) > 2
    results: list[torch.Tensor] = []
    found = [task.test(model, Shared(index, count, results)) for index in range(count)]  # the last one knows all
    assert all(len(rows) for rows in results)
    assert found[-1] == task.test(model)


def test_the_years_own_measure_comes_first(tmp_path) -> None:
    vockit.draw(tmp_path)
    (tmp_path / "VOCdevkit" / "VOC2007").rename(tmp_path / "VOCdevkit" / "VOC2012")
    config = replace(SMALL, data="voc2012", data_dir=tmp_path, splits=("trainval", "test"))
    assert list(Detection.open(config).scores) == ["AP50 (area)", "AP50 (11 points)"]


def test_costs_count_every_weight() -> None:
    """What is counted reaches all of them, and a photograph's tensor has the shape that is assumed."""
    model = build_seeded(network_builder(SMALL), 0)
    assert image_shape(replace(SMALL, image_size=600)) == (3, 608, 800)
    dense_pass(model, torch.randn(1, *image_shape(SMALL))).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


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


def test_photographs_of_a_set_are_those_of_the_command_line(kit) -> None:
    assert load_voc("voc2007", kit, image_size=36)[0].digest() in open_task(replace(SMALL, data_dir=kit)).digest()
