"""Blocks that write into their input are scaled as those that do not."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist.blocks.chains import choose_chains
from resist.blocks.residual import Stream
from resist.export import fold_scale
from resist.subnet.scaling import KeepInput, ScaleBranch, scale_blocks, scale_branches, scales_of, unhook

SCALE = 0.4


class Block(nn.Module):
    """x + f(x), written in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(6, 6), nn.Linear(6, 6), way

    def forward(self, x: Tensor) -> Any:
        branch = self.b(torch.relu(self.a(torch.relu(x))))
        if self.way == "+=":
            x += branch
        elif self.way == "add_":
            x.add_(branch)
        elif self.way == "out=":
            torch.add(x, branch, out=x)
        elif self.way == "view":
            x.view(-1).add_(branch.view(-1))
        elif self.way == "before":  # it is changed, and read again
            x.mul_(2.0)
            return x / 2.0 + branch
        elif self.way == "tuple":
            x += branch
            return x, None
        else:
            return x + branch
        return x


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Linear(6, 6), nn.ModuleList(Block(way) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def scaled(way: str) -> Net:
    net = Net(way).eval()
    scale_branches(net, choose_chains(net, ("blocks",)), [SCALE])
    return net


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
WAYS = ["+=", "add_", "view", "before", "tuple"]


@pytest.mark.parametrize("way", [*WAYS, "out="])
def test_the_scale_is_right_without_gradients(way: str) -> None:
    with torch.no_grad():
        expected = scaled("out of place")(X)
        torch.testing.assert_close(scaled(way)(X), expected)
        assert not torch.allclose(expected, Net(way)(X))
    with torch.inference_mode():
        torch.testing.assert_close(scaled(way)(X), expected)


@pytest.mark.parametrize("way", WAYS)
def test_gradients(way: str) -> None:
    gradients = []
    for one in (way, "out of place"):
        net, x = scaled(one), X.clone().requires_grad_()
        net(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in net.parameters())])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_compiled_exported_and_copied(way: str) -> None:
    with torch.no_grad():
        expected, net = scaled("out of place")(X), scaled(way)
        torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(X), expected)
        for strict in (True, False) if way == "+=" else (False,):
            torch.testing.assert_close(torch.export.export(net, (X,), strict=strict).module()(X), expected)
        torch.testing.assert_close(copy.deepcopy(net)(X), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(net))(X), expected)
        torch.testing.assert_close(scale_blocks(Net(way), scales_of(net))(X), expected)
        torch.testing.assert_close(fold_scale(net, X)(X), expected)


def test_the_hooks_are_removed() -> None:
    net = scaled("+=")
    for block in net.blocks:
        unhook(block)
        assert not block._forward_hooks
        assert not block._forward_pre_hooks
    assert torch.equal(net(X), Net("+=").eval()(X))


def test_hooks_that_were_there_before_see_the_scaled_state() -> None:
    net, seen = Net("+=").eval(), []
    for block in net.blocks:
        block.register_forward_hook(lambda _block, _args, output: seen.append(output.clone()))
    scale_branches(net, choose_chains(net, ("blocks",)), [SCALE])
    with torch.no_grad():
        assert torch.equal(net(X), seen[-1])


def test_other_places() -> None:
    class Odd(nn.Module):
        def forward(self, mask: Tensor, *, state: dict[str, Tensor]) -> list[Any]:
            state["h"] += mask
            return [None, {"h": state["h"]}]

    block, h, stream = Odd(), torch.ones(2), Stream(("state", "h"), (1, "h"))
    block.register_forward_pre_hook(KeepInput(stream), with_kwargs=True)
    block.register_forward_hook(ScaleBranch(SCALE, stream), with_kwargs=True)
    nothing, output = block(torch.full((2,), 10.0), state={"h": h})
    assert nothing is None
    assert torch.equal(output["h"], torch.full((2,), 5.0))
    assert torch.equal(h, torch.ones(2))
