"""Tests of `resist.subnet.structure`: a network that has changed is noticed, at the next synchronization too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import resist
from resist.models import PreActResNet
from resist.subnet.structure import Structure


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.ones(4, 4))


def rename_module(model: nn.Sequential) -> None:
    children = model[1]._modules
    children["norm"] = children.pop("1")


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a parameter is replaced": replace_parameter,
    "a parameter is added": lambda model: model[1].register_parameter("gain", nn.Parameter(torch.ones(1))),
    "a parameter is removed": lambda model: delattr(model[0], "bias"),
    "a module is replaced": lambda model: model.__setitem__(0, nn.Linear(4, 4)),
    "a module is added": lambda model: model.append(nn.ReLU()),
    "a module is renamed": rename_module,
    "a buffer is added": lambda model: model[0].register_buffer("table", torch.zeros(1)),
    "a table is another one": lambda model: setattr(model[0], "_parameters", dict(model[0]._parameters)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str) -> None:
    model = net()
    structure = Structure(model)
    assert structure.stays()
    CHANGES[change](model)
    assert not structure.stays()


def test_numbers_do_not_count() -> None:
    model = net()
    structure = Structure(model)
    model(torch.randn(8, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d)).running_mean = torch.ones(4)
    model.half()
    assert structure.stays()


def test_a_network_that_lists_its_parameters_itself_is_always_looked_at() -> None:
    class Own(nn.Linear):
        def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
            yield "weight", self.weight

    assert not Structure(Own(2, 2)).stays()
    assert not Structure(torch.jit.trace(net().eval(), torch.zeros(2, 4))).stays()  # pyright: ignore[reportArgumentType]


def test_a_parameter_that_is_replaced_between_two_rounds_is_exchanged() -> None:
    job = resist.Job(lambda: PreActResNet((1, 3, 1, 1), 10, width=8), resist.resist(2, 1, min_depth=0), example=False)
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.1) for worker in job.workers]
    job.step(*optimizers)
    for value, worker in zip((3.0, 5.0), job.workers, strict=True):
        layer = next(m for m in worker.model.modules() if isinstance(m, nn.Conv2d))
        layer.weight = nn.Parameter(torch.full_like(layer.weight, value))
    job.step(*optimizers)
    full = job.full_model([torch.zeros(2, 3, 8, 8)])
    assert full is not None
    assert next(m for m in full.modules() if isinstance(m, nn.Conv2d)).weight.unique().tolist() == [4.0]
