"""Mixed images and labels: in the shares of torchvision, and a function of (seed, worker, step)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resist.data import Images, Loader, Mixed, Sampler, load
from resist.runs.config import NetworkConfig, OptimizationConfig
from resist.tasks import open_task


def digits() -> Images:
    train, _ = load("digits")
    assert isinstance(train, Images)
    return train


def mixed(seed: int = 0, worker: int = 0, **shares: float) -> Mixed:
    sampler = Sampler(len(digits()), batch_size=8, seed=seed, worker=worker, workers=2)
    return Mixed(Loader(digits(), sampler), sampler, 10, **shares)


def test_mixup_is_the_same_share_of_images_and_labels() -> None:
    batches = mixed(mixup=0.4)
    shares = set()
    for step in range(4):
        images, labels = batches.batch(step)
        plain, classes = batches._loader.batch(step)
        one_hot = F.one_hot(classes, 10).float()
        difference = one_hot - one_hot.roll(1, 0)
        share = ((labels - one_hot.roll(1, 0))[difference != 0] / difference[difference != 0]).mean()
        torch.testing.assert_close(labels, share * one_hot + (1 - share) * one_hot.roll(1, 0))
        torch.testing.assert_close(images, share * plain + (1 - share) * plain.roll(1, 0), atol=1e-5, rtol=1e-5)
        shares.add(round(float(share), 4))
    assert len(shares) == 4


def test_cutmix_gives_the_label_the_share_of_the_area() -> None:
    batches = mixed(cutmix=1.0)
    for step in range(4):
        images, labels = batches.batch(step)
        plain, classes = batches._loader.batch(step)
        pasted = (images != plain).any(1)
        assert (images == plain).all(1).logical_or((images == plain.roll(1, 0)).all(1)).all()
        torch.testing.assert_close(labels.sum(1), torch.ones(8))
        own = labels[torch.arange(8), classes][classes != classes.roll(1, 0)]
        area = pasted.flatten(1).any(0).float().mean()  # at least: black margins look the same
        assert own.unique().numel() == 1
        assert own[0] <= 1 - area + 1e-5


def test_the_draws_follow_seed_worker_and_step_alone() -> None:
    once = mixed(mixup=0.2, cutmix=1.0)
    expected = [once.batch(step) for step in range(6)]
    torch.manual_seed(9)
    before = torch.get_rng_state()
    again = mixed(mixup=0.2, cutmix=1.0)
    for step in (5, 2, 0):
        for a, b in zip(again.batch(step), expected[step], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)  # nothing else is disturbed
    for other in (mixed(seed=1, mixup=0.2, cutmix=1.0), mixed(worker=1, mixup=0.2, cutmix=1.0)):
        assert not torch.equal(other.batch(0)[1], expected[0][1])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shares", [{"mixup": 0.2}, {"cutmix": 1.0}], ids=str)
def test_mixed_images_keep_their_memory_format(shares: dict[str, float], channels_last: bool) -> None:
    data = digits().to("cpu", channels_last=channels_last)
    sampler = Sampler(len(data), batch_size=8, seed=0, worker=0, workers=2)
    images, _ = Mixed(data.loader(sampler), sampler, 10, **shares).batch(0)
    assert images.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert images.is_contiguous() is not channels_last


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_mixed_labels(smoothing: float) -> None:
    options = OptimizationConfig(mixup=0.3, label_smoothing=smoothing, batch_size=8)
    task = open_task(NetworkConfig(), options)
    sampler = Sampler(task.num_images, batch_size=8, seed=0, worker=0, workers=1)
    images, labels = task.batches(sampler).batch(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    shares = labels * (1 - smoothing) + smoothing / 10
    expected = -(shares * F.log_softmax(model(images), 1)).sum(1).mean()
    torch.testing.assert_close(task.loss(model, (images, labels)), expected)
    parts = task.split((images, labels), 2)
    torch.testing.assert_close(sum(task.loss(model, part) / 2 for part in parts), expected)


def test_statistics_are_estimated_on_mixed_images() -> None:
    first = [next(iter(open_task(NetworkConfig(), o).calibration(0))) for o in
             (OptimizationConfig(), OptimizationConfig(mixup=1.0))]  # fmt: skip
    assert first[0].shape == first[1].shape
    assert first[1].var() < first[0].var()
