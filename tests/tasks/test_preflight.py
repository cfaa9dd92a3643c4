"""Chains that are chosen without an example, as for networks of this package."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from detectors import SMALL
from resist.blocks.chains import choose_chains
from resist.checking.validate import choose_checked
from resist.cli.plan import PlanConfig, describe_plan
from resist.cost.footprint import choose
from resist.errors import UserError
from resist.models.faster_rcnn import dense_pass
from resist.runs.config import MethodConfig, NetworkConfig, OptimizationConfig, TrainConfig
from resist.subnet.seeded import build_seeded
from resist.tasks import network_builder
from resist.tasks.preflight import check_parts, example_of

SHAPE = ("depths=1,2,4,1", "width=4")


def dense(images: Tensor) -> Callable[[nn.Module], object]:
    return lambda model: dense_pass(model, images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "example"),
    [
        (NetworkConfig(data="digits", model_args=SHAPE), torch.randn(2, 3, 16, 16)),
        (NetworkConfig(data="folder", model="preact_resnet50_imagenet", model_args=SHAPE), torch.randn(2, 3, 32, 32)),
        (SMALL, dense(torch.randn(2, 3, 36, 36))),
    ],
    ids=["preact", "photographs", "detector"],
)
def test_our_networks_need_no_example(config: NetworkConfig, example: object) -> None:
    """The chains are those that an example gives, and the networks keep the laws."""
    assert example_of(config) is False
    model = build_seeded(network_builder(config, 3), 0)
    assert choose_checked(model, (), example) == choose_chains(model)


def test_plan_and_cost_choose_the_chains_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network whose blocks take two arguments has chains for those who have an example alone."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, gate: Tensor, *, shift: Tensor) -> Tensor:
            assert gate.shape == (len(x), 1), "only with the arguments of the network"
            return x + gate * self.fc(x + shift)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(6)), nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = images.mean((2, 3))[:, :1].expand(-1, 4)
            for block in self.blocks:
                x = block(x, x[:, :1].sigmoid(), shift=x.mean(0))
            return self.head(x)

    monkeypatch.setattr("resist.models.build_third_party", lambda name, **_: Net())
    config = PlanConfig(NetworkConfig(data="digits", model="timm:mine"), MethodConfig(workers=2), num_classes=3)
    described = describe_plan(config)
    chains = choose(Net, Net(), (), example_of(config.network))
    assert [chain["name"] for chain in described["chains"]] == [chain.name for chain in chains] == ["blocks:0-5"]


@pytest.mark.parametrize(("batch_size", "parts"), [(1, 1), (4, 4)])
def test_parts_of_one_image_are_refused_where_a_norm_gets_a_single_value(batch_size: int, parts: int) -> None:
    optimization = OptimizationConfig(batch_size=batch_size, grad_accum_steps=parts)
    last_is_a_pixel = NetworkConfig(data="synthetic", model="torchvision:resnet18")
    with pytest.raises(
        UserError, match=rf"layer layer4.*BatchNorm2d.* 1 x 1\); `batch_size={batch_size}`.* at least two"
    ):
        check_parts(TrainConfig(network=last_is_a_pixel, optimization=optimization))
    assert check_parts(TrainConfig(network=last_is_a_pixel, optimization=OptimizationConfig(batch_size=2))) == []
    larger = TrainConfig(network=NetworkConfig(data="synthetic", model_args=SHAPE), optimization=optimization)
    assert "each image by its own statistics" in check_parts(larger)[0]
