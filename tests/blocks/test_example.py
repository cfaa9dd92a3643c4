"""Networks that are right with an example, and networks of which a sub-network would be another network."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resist.blocks.chain import COMPACT, IN_PLACE
from resist.blocks.example import MOST_ITEMS, as_forward, look
from resist.blocks.rehearsal import Rehearsal
from resist.checking.validate import choose_checked
from resist.errors import UserError

pytestmark = pytest.mark.slow

WIDTH, BLOCKS = 8, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def f(self, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
        return self.b(torch.tanh(self.a(self.norm(x))) * mask)

    def forward(self, x: Tensor) -> Any:
        return x + self.f(x)


class Net(nn.Module):
    """Blocks under any forward."""

    def __init__(self, body: Callable[["Net", Tensor], Any], block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(block() for _ in range(BLOCKS))
        self.head, self.body = nn.Linear(WIDTH, WIDTH), body
        self.gains = nn.Parameter(torch.randn(BLOCKS, WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.stem(x))


def block_of(forward: Callable[..., Any]) -> type[Block]:
    return type("Made", (Block,), {"forward": forward})


def loop(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)
    return net.head(x)


def masked(net: Net, x: Tensor) -> Tensor:
    mask = torch.sigmoid(x)
    for block in net.blocks:
        x = block(mask, x)
    return net.head(x)


def named_last(net: Net, x: Tensor) -> Tensor:
    mask = torch.sigmoid(x)
    for block in net.blocks:
        x, mask = block(mask=mask, hidden=x)
    return net.head(x)


def in_a_tuple(net: Net, x: Tensor) -> Tensor:
    state = x, torch.sigmoid(x)
    for block in net.blocks:
        state = block(state)
    return net.head(state[0])


def first_item(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        (x, *_) = block(x).values()
    return net.head(x)


@dataclasses.dataclass
class Output:
    hidden: Tensor
    attention: object = None


def record_out(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x).hidden
    return net.head(x)


def dropped_layers(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        rate = torch.rand([]) + random.random() + np.random.uniform()
        if net.training and rate < 0.9:
            continue
        x = block(x)
    return x + torch.rand([])


def sum_of_losses(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(())
    for block in net.blocks:
        x, loss = block(x)
        total = total + loss
    return x, total


def threaded_loss(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    total = x.new_zeros(())
    for block in net.blocks:
        x, total = block(x, total)
    return x, total


def backwards_twice(net: Net, x: Tensor) -> Tensor:
    for block in (*reversed(net.blocks), *net.blocks):
        x = block(x)
    return x


def nothing(net: Net, x: Tensor) -> None:
    loop(net, x)


def forces(net: Net, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loop(net, x).sum(), x)[0]


def checkpointed(net: Net, x: Tensor) -> Any:
    for block in net.blocks:
        x = checkpoint(block, x, use_reentrant=False) if net.training else block(x)
    return x


def with_state(net: Net, x: Tensor) -> Tensor:
    state = [x.new_zeros(len(x), WIDTH, BLOCKS)]
    for block in net.blocks:
        x, state = block(x, state)
    return net.head(x)


class Stateful(Block):
    """It writes into its own part of a state, which it takes and returns, as RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.number = int(torch.randint(BLOCKS, ()))

    def forward(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        f = self.f(x)
        state[0][:, :, self.number] = f.detach()
        return x + f, state


class Cached(Block):
    """A table that is made in the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        table = self.cache.setdefault(x.shape[-1], torch.linspace(0, 1, x.shape[-1]))
        return x + self.f(x + table)


class Experts(Block):
    """The best expert of each item; all weights are equal at the beginning, so that they tie."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 3), nn.Parameter(torch.zeros(3, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("bi,bio->bo", x, self.experts[self.router(x).argmax(-1)])


class Frozen(nn.Module):
    """A frozen BatchNorm with statistics: its weights are buffers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.get_buffer("weight") * self.get_buffer("running_var").rsqrt()
        return (x - self.get_buffer("running_mean")) * scale + self.get_buffer("bias")


class FrozenBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = Frozen()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.frozen(self.f(x)))


class Spectral(Block):
    """Its weight is computed by a hook, and is not zero where its parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.utils.spectral_norm(self.b)


class Normed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)  # type: ignore[assignment]


class ZeroInit(Block):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)


def class_of_its_own() -> nn.Module:
    """A class that is made for one block, by the same code for all."""
    return type("Own", (Block,), {"gain": float(torch.rand(())), "forward": lambda m, x: x + m.gain * m.f(x)})()


RIGHT: dict[str, tuple[Callable[[Net, Tensor], Any], Callable[[], nn.Module]]] = {
    "plain": (loop, Block),
    "in place": (loop, block_of(lambda m, x: x.add_(m.f(x)))),
    "in place in a view": (loop, block_of(lambda m, x: x.view(-1, WIDTH).add_(m.f(x)).view_as(x))),
    "out=": (loop, block_of(lambda m, x: torch.add(x, m.f(x), out=x))),
    "the mask first": (masked, block_of(lambda m, mask, x: x + m.f(x, mask))),
    "keywords, the mask first": (named_last, block_of(lambda m, mask, hidden: (hidden + m.f(hidden, mask), mask))),
    "a tuple in and out": (in_a_tuple, block_of(lambda m, state: (state[0] + m.f(*state), state[1]))),
    "a dict": (first_item, block_of(lambda m, x: {"hidden": x + m.f(x), "attention": x.mean()})),
    "a dataclass": (record_out, block_of(lambda m, x: Output(x + m.f(x), x.mean()))),
    "random masks": (lambda m, x: loop(m, x) * (torch.rand_like(x) > 0.3), Block),
    "noise in blocks": (loop, block_of(lambda m, x: x + F.dropout(m.f(x), 0.5, True) + 0.0 * torch.randn(()))),
    "layer drop": (dropped_layers, Block),
    "a sum of losses": (sum_of_losses, block_of(lambda m, x: (x + m.f(x), m.f(x).square().mean()))),
    "a threaded loss": (threaded_loss, block_of(lambda m, x, t: (x + m.f(x), t + 1 + m.f(x).square().mean()))),
    "other orders, twice": (backwards_twice, Block),
    "no output": (nothing, Block),
    "forces": (forces, Block),
    "checkpoints": (checkpointed, Block),
    "tiny": (lambda m, x: loop(m, 1e-30 * x), Block),
    "huge": (lambda m, x: loop(m, 1e30 * x), Block),
    "overflow": (loop, block_of(lambda m, x: x + m.b(torch.exp(15 * m.a(x))))),
    "bf16": (loop, Block),
    "a cache": (loop, Cached),
    "experts": (loop, Experts),
    "frozen batchnorm": (loop, FrozenBlock),
    "spectral norm": (loop, Spectral),
    "batchnorm": (loop, Normed),
    "zero init": (loop, ZeroInit),
    "a state": (with_state, Stateful),
    "a class for each block": (loop, class_of_its_own),
}


def example(items: int = 4) -> Tensor:
    return torch.randn(items, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", RIGHT)
def test_networks_that_are_right(name: str) -> None:
    net = Net(*RIGHT[name]).train()
    batch = example()
    if name == "bf16":
        net, batch = net.bfloat16(), batch.bfloat16()
    before, rng = {key: t.clone() for key, t in net.state_dict().items()}, torch.get_rng_state()
    state = random.getstate(), np.random.get_state()
    (chain,) = choose_checked(net, (), batch)
    assert (chain.name, chain.form) == (f"blocks:0-{BLOCKS - 1}", COMPACT)
    assert bool(chain.streams) == (name in ("the mask first", "keywords, the mask first"))
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert state[0] == random.getstate()
    assert all(np.array_equal(one, other) for one, other in zip(state[1], np.random.get_state(), strict=True))
    assert all(module.training for module in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules() if not isinstance(m, nn.Linear))


def features(net: Net, x: Tensor) -> list[Tensor]:
    found = []
    for number, block in enumerate(net.blocks):
        x = block(x)
        if number in (1, 4):
            found.append(x)
    return found


def gains(net: Net, x: Tensor) -> Tensor:
    for block, gain in zip(net.blocks, net.gains, strict=False):
        x = block(x) * gain
    return x


def only_in_training(net: Net, x: Tensor) -> Tensor:
    for number, block in enumerate(net.blocks):
        x = x + (block(x) - x) * (1 - 0.1 * number if net.training else 1.0)
    return x


def by_depth(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = x + (block(x) - x) / math.sqrt(len(net.blocks))
    return x


def pooled(net: Net, x: Tensor) -> Tensor:
    states = []
    for block in net.blocks:
        x = block(x)
        states.append(x)
    return torch.stack(states).mean(0)


def popped(net: Net, x: Tensor) -> Tensor:
    states = []
    for block in net.blocks[: BLOCKS // 2]:
        x = block(x)
        states.append(x)
    for block in net.blocks[BLOCKS // 2 :]:
        x = block(x + states.pop())
    return x


@pytest.mark.parametrize("body", [features, gains, only_in_training, by_depth, pooled, popped])
def test_what_goes_by_position_keeps_its_positions(body: Callable[[Net, Tensor], Any]) -> None:
    (chain,) = choose_checked(Net(body), (), example())
    assert chain.form == IN_PLACE


def two_streams(net: Net, x: Tensor) -> Tensor:
    y = 2 * x
    for block in net.blocks:
        x, y = block(x, y)
    return x + y


def left_early(net: Net, x: Tensor) -> Tensor:
    for number, block in enumerate(net.blocks):
        x = block(x)
        if number == 3:
            break
    return x


def norm_of_the_last(net: Net, x: Tensor) -> Tensor:
    return net.blocks[-1].norm(loop(net, x))  # type: ignore[operator,union-attr]


def penalized(net: Net, x: Tensor) -> Tensor:
    return loop(net, x) * sum(block.a.weight.square().sum() for block in net.blocks)  # type: ignore[operator,union-attr]


def kept(net: Net, x: Tensor) -> Tensor:
    return x + loop(net, x)


def without_return(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        block(x)
    return x


class Captured(Net):
    """Hooks that write into the network in which they were made."""

    def __init__(self) -> None:
        super().__init__(lambda net, x: (net.states.clear(), loop(net, x) + sum(net.states[1:3]))[1])  # type: ignore[operator]
        self.states: list[Tensor] = []
        for block in self.blocks:
            block.register_forward_hook(lambda _block, _args, output: self.states.append(output))


class Closed(Net):
    def __init__(self) -> None:
        super().__init__(lambda _net, x: loop(self, x))


ELSEWHERE: list[nn.Module] = []  # a registry, as of a plugin


class Elsewhere(Net):
    """It calls a layer of the network that was made last, which no copy can follow."""

    def __init__(self) -> None:
        super().__init__(lambda _net, x: loop_of_the_last(x))
        ELSEWHERE[:] = [self.head]


def loop_of_the_last(x: Tensor) -> Tensor:
    return ELSEWHERE[0](x)


def other_method(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = x + block.f(x)  # type: ignore[operator]
    return net.head(x)


class Fussy(Block):
    def forward(self, x: Tensor) -> Tensor:
        if not bool(self.a.weight.any()):
            raise ValueError("no weights")
        return x + self.f(x)


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two streams": (
        lambda: Net(two_streams, block_of(lambda m, x, y: (x + m.f(x), y + m.f(x + y)))),
        r"blocks.0 adds to 2 tensors that it gets and returns, of which only one would be scaled",
    ),
    "left early": (lambda: Net(left_early), r"does not call blocks.4, blocks.5 of chain blocks:0-5 with `example`"),
    "the last one's norm": (
        lambda: Net(norm_of_the_last),
        r"blocks 0 2 4 of blocks:0-5 does not compute .*: what it makes of the states of its blocks, .* depends on the",
    ),
    "weights outside": (lambda: Net(penalized), r"depends on the position of a block or on their number"),
    "in place, and used again": (
        lambda: Net(kept, block_of(lambda m, x: x.add_(m.f(x)))),
        r"the blocks of blocks:0-5 write into a tensor that the network uses again, .* compute out of place",
    ),
    "in place, without return": (lambda: Net(without_return, block_of(lambda m, x: x.add_(m.f(x)) and None)), r"."),
    "hooks that capture": (
        Captured,
        r"blocks 0 2 4 of blocks:0-5 does not compute .* depends on the",
    ),
    "a module elsewhere": (Elsewhere, r"keeps a reference"),
    "never called": (lambda: Net(lambda net, x: x), r"the model has no chain"),
    "another method": (
        lambda: Net(other_method),
        r"blocks:0-5 is a run of equal blocks, but the network does not call blocks.0 with `example`, or calls another",
    ),
    "a block that refuses zeros": (
        lambda: Net(loop, Fussy),
        r"a copy of blocks.0 could not be tested with the arguments .* with `example`: ValueError: no weights; without",
    ),
    "another batch": (
        lambda: Net(lambda net, x: x @ x),
        r"cannot be run with `example` \(RuntimeError: .*mat1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_networks_that_are_refused(name: str) -> None:
    build, message = WRONG[name]
    net = build()
    states = getattr(net, "states", [])
    with pytest.raises(UserError, match=message) as raised:
        choose_checked(net, (), example())
    assert "\n" not in str(raised.value)
    assert states == []
    assert net.training


def test_a_lambda_follows_the_copy() -> None:
    (chain,) = choose_checked(Closed(), (), example())
    assert chain.form == COMPACT


def test_the_original_error_is_the_cause() -> None:
    def fails(net: Net, x: Tensor) -> Tensor:
        raise KeyError("depth")

    with pytest.raises(UserError, match=r"cannot be run with `example` \(KeyError: 'depth'\)") as raised:
        choose_checked(Net(fails), (), example())
    assert isinstance(raised.value.__cause__, KeyError)


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor, size: Any = None) -> Tensor:
        assert isinstance(x, Tensor)
        if isinstance(size, Tensor):
            raise TypeError("labels?")
        self.seen.append((x, size))
        return x.add_(1)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (torch.zeros(3, 2), None),
        ((torch.zeros(3, 2),), None),
        ([torch.zeros(3, 2), "a"], "a"),
        ((torch.zeros(3, 2), torch.zeros(3)), None),
        ((torch.zeros(3, 2), 1, 2, 3), None),
        ({"x": torch.zeros(3, 2), "size": 5}, 5),
        (lambda model: model(torch.zeros(3, 2), size=7), 7),
    ],
)
def test_forms_of_examples(given: object, size: object) -> None:
    forward, net = as_forward(given), Seen()
    forward(net)
    forward(net)
    assert [tuple(x.shape) for x, _ in net.seen] == [(3, 2)] * 2
    assert all(torch.equal(x, torch.ones(3, 2)) for x, _ in net.seen)  # each call gets a copy
    assert net.seen[1][1] == size


def test_large_batches_are_cut_where_the_network_takes_it() -> None:
    net = Seen()
    as_forward((torch.zeros(64, 2), torch.zeros(64)))(net)
    assert net.seen[0][0].shape == (MOST_ITEMS, 2)
    fixed = Net(lambda net, x: x.view(64, WIDTH))
    assert as_forward(torch.zeros(64, WIDTH))(fixed).shape == (64, WIDTH)  # type: ignore[union-attr]
    as_forward({"x": torch.zeros(64, 2), "size": torch.zeros(2, 5)}.get)  # a function
    with pytest.raises(TypeError, match="labels"):
        as_forward({"x": torch.zeros(64, 2), "size": torch.zeros(2, 5)})(net)


@pytest.mark.parametrize(
    ("given", "message"),
    [(iter([1]), r"is an iterator; give one batch of it"), (nn.Linear(1, 1), r"is Linear; give a batch")],
)
def test_wrong_examples(given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_forward(given)


def test_calls_are_recorded_as_they_are() -> None:
    net = Net(masked, block_of(lambda m, mask, x: x.add_(m.f(x, mask))))
    calls = look(Rehearsal(as_forward(example()), net), net, net).calls
    assert set(calls) == {f"blocks.{number}" for number in range(BLOCKS)}
    mask, x = calls["blocks.1"].args
    torch.testing.assert_close(mask, torch.sigmoid(net.stem(example())))
    first = net.stem(example())
    torch.testing.assert_close(x, first + net.blocks[0].f(first, mask))  # type: ignore[operator,union-attr]
