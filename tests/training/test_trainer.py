"""Steps of one worker, and the data that they are taken on."""

import pytest
import torch
from torch import nn

from resist.data import load
from resist.runs.config import OptimizationConfig, TrainConfig
from resist.subnet.network import Subnet
from resist.subnet.tensors import tensors_of
from resist.sync.worker import Worker
from resist.tasks import Classification
from resist.training.trainer import Trainer, make_sampler


class Mean(nn.Module):
    """Scores that are linear in the image, so that gradients add up exactly as the theory says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
        self.head = nn.Linear(3 * 16 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


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
