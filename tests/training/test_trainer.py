"""Steps of one worker, and the data that they are taken on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from resist.data import load
from resist.models import PreActResNet
from resist.runs.config import OptimizationConfig, TrainConfig
from resist.subnet.network import Subnet
from resist.subnet.tensors import tensors_of
from resist.sync.worker import Worker
from resist.tasks import Classification
from resist.training.trainer import Trainer, make_sampler
from waits import fake_gpu


class Mean(nn.Module):
    """Scores that are linear in the image, so that gradients add up exactly as the theory says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
        self.head = nn.Linear(3 * 16 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


def small() -> PreActResNet:
    return PreActResNet((1, 1, 2, 1), 10, width=4)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    task = Classification(Mean, *load("digits"))
    weights = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = Mean()
        subnet = Subnet(model, (), ())
        subnet.load(tensors_of(model), ())
        config = TrainConfig(optimization=OptimizationConfig(batch_size=32, grad_accum_steps=parts))
        trainer = Trainer(config, Worker(0, subnet), task, make_sampler(config, task.num_images, worker=0))
        loss = [float(trainer.step(step, 0.1)) for step in range(3)]
        weights.append((loss, subnet.flat.clone()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    torch.testing.assert_close(weights[0][1], weights[1][1])


def test_the_data_digest_sees_a_single_label() -> None:
    task = Classification(Mean, *load("digits"))
    before = task.digest()
    task.train.labels[7] += 1
    assert task.digest() != before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by the deep copy of an average
@pytest.mark.parametrize("options", [{}, {"model_ema_decay": 0.9, "clip_grad_norm": 1.0}])
def test_a_step_does_not_wait_for_a_gpu(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network of our own, with BatchNorm; nor does a test, but for its result.

    Without a GPU there is no backward pass on fake tensors, so gradients are made in its place.
    """

    def backward(_: torch.Tensor) -> None:
        for parameter in subnet.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    config = TrainConfig(optimization=OptimizationConfig(batch_size=8, grad_accum_steps=2, **options))
    train, test = (replace(data, images=data.images[:64], labels=data.labels[:64]) for data in load("synthetic"))
    task = Classification(small, train, test)
    with torch.device("meta"):
        template = small()
    with fake_gpu() as waits:
        subnet = Subnet(template, (), (), device="cuda")
        own = task.to("cuda", channels_last=True)
        trainer = Trainer(config, Worker(0, subnet), own, make_sampler(config, 64, worker=0))
        trainer.step(0, 0.1)  # mean and spread of the data go to the device once
        waits.clear()
        for step in (1, 2):
            assert trainer.step(step, 0.1).device.type == "cuda"
        assert (waits.found, waits.copies, waits.pinned) == ([], 2, 2)
        waits.clear()
        with pytest.raises(DataDependentOutputException):  # a fake tensor has no values
            own.test(subnet.model)
        assert (waits.found, waits.copies) == ([], 0)
