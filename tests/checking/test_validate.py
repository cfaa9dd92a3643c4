"""The laws that a network has to satisfy, and networks that break one each."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resist.blocks.chains import choose_chains
from resist.checking.validate import check_network
from resist.errors import UserError
from resist.models import build


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, extra: Tensor | float = 0.0) -> Tensor:
        return x + self.out(torch.tanh(self.linear(x) + extra))


class Net(nn.Module):
    """Four blocks under any forward."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], container: type = nn.ModuleList) -> None:
        super().__init__()
        blocks = [Block() for _ in range(4)]
        self.blocks = container(*blocks) if container is nn.Sequential else container(blocks)
        self.each = nn.Parameter(torch.randn(4, 8))
        self.depth, self._forward = 4, forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def plain(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)
    return x


def enumerated(net: Net, x: Tensor) -> Tensor:
    for i, block in enumerate(net.blocks):
        x = block(x, net.each[i])
    return x


def zipped(net: Net, x: Tensor) -> Tensor:
    for block, own in zip(net.blocks, net.each, strict=False):
        x = block(x, own)
    return x


def by_depth(net: Net, x: Tensor) -> Tensor:
    for i in range(net.depth):
        x = net.blocks[i](x)
    return x


def last_is_special(net: Net, x: Tensor) -> Tensor:
    for i, block in enumerate(net.blocks):
        x = block(x, 1.0 if i == 1 else 0.0)
    return x


def backwards(net: Net, x: Tensor) -> Tensor:
    for block in reversed(net.blocks):
        x = block(x)
    return x


def twice(net: Net, x: Tensor) -> Tensor:
    return plain(net, plain(net, x))


def dense(net: Net, x: Tensor) -> Tensor:
    """Every block gets the sum of all earlier outputs."""
    states = [x]
    for block in net.blocks:
        states.append(block(torch.stack(states).sum(0)))
    return states[-1]


def check(net: nn.Module) -> float:
    batch = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    return check_network(net, choose_chains(net), lambda network: network(batch))


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_a_network_that_keeps_the_laws_is_left_as_it_was(container: type) -> None:
    net = Net(plain, container).train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    assert check(net) == 0.0
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("forward", [backwards, twice])
def test_the_order_of_calls_is_free(forward: Callable[[Net, Tensor], Tensor]) -> None:
    assert check(Net(forward)) == 0.0


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (enumerated, r"blocks 0 2 of blocks:0-3 does not compute .* depends on the position of a block"),
        (zipped, r"depends on the position of a block"),
        (last_is_special, r"depends on the position of a block"),
        (by_depth, r"blocks 0 2 of blocks:0-3 cannot be run \(IndexError: .*\): a worker's network is shallower"),
        (dense, r"depends on the position of a block"),
    ],
)
def test_networks_that_break_a_law(forward: Callable[[Net, Tensor], Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check(Net(forward))
    assert "\n" not in str(raised.value)


def test_small_differences_are_seen() -> None:
    """Small initial weights must not hide that a network depends on the position of a block."""
    net = Net(enumerated)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1e-9)
    with pytest.raises(UserError, match="depends on the position"):
        check(net)


def test_blocks_that_only_look_residual() -> None:
    """A block is tested with the inputs that it gets in the network."""

    class Shuffle(Block):
        def forward(self, x: Tensor, extra: Tensor | float = 0.0) -> Tensor:
            if x.shape[-1] != 8 or x.dim() != 2:
                raise ValueError("not for me")
            return x.flip(-1) + self.linear(x)

    net = Net(plain)
    net.blocks = nn.ModuleList(Shuffle() for _ in range(3))
    with pytest.raises(UserError, match=r"blocks:0-2 is a run of equal blocks, but its blocks have no skip connection"):
        choose_chains(net)

    class Fussy(Shuffle):
        def forward(self, x: Tensor, extra: Tensor | float = 0.0) -> Tensor:
            assert x.shape[0] == 3
            return super().forward(x)

    net.blocks = nn.ModuleList(Fussy() for _ in range(3))
    chains = choose_chains(net, ("blocks",))
    with pytest.raises(UserError, match=r"blocks.0 is not a residual block: with all its weights zero"):
        check_network(net, chains, lambda network: network(torch.randn(3, 8)))


def test_two_chains_and_batchnorm() -> None:
    net = build("preact_small", num_classes=10, width=4, depths=(3, 1, 4, 1))
    chains = choose_chains(net, ("layer1", "layer3"))
    images = torch.randn(2, 3, 8, 8)
    assert check_network(net, chains, lambda network: network(images)) < 1e-6


class Momentum(Block):
    """A block that moves a frozen copy of its weights, and keeps a sparse table."""

    def __init__(self, write: Callable[["Momentum"], None]) -> None:
        super().__init__()
        self.slow = nn.Parameter(self.linear.weight.detach().clone(), requires_grad=False)
        self.write, self.table = write, torch.eye(3).to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.write(self)
        return super().forward(x) + 0.1 * nn.functional.linear(x, self.slow)


@torch.no_grad()
def in_place(block: Momentum) -> None:
    block.slow.lerp_(block.linear.weight, 0.1)


def through_data(block: Momentum) -> None:
    block.slow.data.mul_(0.9)


def by_assignment(block: Momentum) -> None:
    block.slow.data = 0.9 * block.slow.data


@pytest.mark.parametrize("write", [in_place, through_data, by_assignment])
def test_weights_that_a_forward_pass_writes_are_seen_alike_and_left_as_they_were(
    write: Callable[[Momentum], None],
) -> None:
    model = Net(plain).train()
    model.blocks = nn.ModuleList(Momentum(write) for _ in range(4))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert check(model) == 0.0
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


GAINS: "weakref.WeakKeyDictionary[nn.Module, float]" = weakref.WeakKeyDictionary()


class Looked(Block):
    """A block whose gain is in a table outside of the network."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        GAINS[self] = gain

    def forward(self, x: Tensor, extra: Tensor | float = 0.0) -> Tensor:
        return x + GAINS.get(self, 1.0) * self.out(torch.tanh(self.linear(x) + extra))


def test_a_table_by_the_identity_of_modules_is_refused() -> None:
    net = Net(plain)
    net.blocks = nn.ModuleList(Looked(float(number)) for number in range(4))
    with pytest.raises(UserError, match=r"a copy of the network does not compute the same .* such as a table"):
        check(net)
