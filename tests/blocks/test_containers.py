"""Chains of blocks that alternate, under any container, with a skip connection inside or outside; their two forms."""

import json
import logging
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resist.blocks.bypass import Bypass, in_place
from resist.blocks.chain import Chain
from resist.blocks.chains import choose_chains, find_chains
from resist.blocks.runs import spans
from resist.checking.validate import choose_checked
from resist.errors import UserError
from resist.subnet.network import Subnet
from resist.subnet.scaling import records_for, records_of, scale_blocks, scale_branches, scales_of, unhook
from resist.subnet.tensors import tensors_of

pytestmark = pytest.mark.slow

WIDTH = 8
X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
Loop = Callable[[nn.Module, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class PreNorm(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


class Residual(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Net(nn.Module):
    """A stem, `parts` with the forward `loop`, and a head."""

    def __init__(self, loop: Loop, **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.loop = nn.Linear(4, WIDTH), loop
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.loop(self, self.stem(x)))


class Stage(nn.Module):
    """Not a container of torch, but calls its children one after another."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        for number, block in enumerate(blocks):
            self.add_module(f"layer_{number}", block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


class Stack(nn.ModuleList):
    """A list with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class Raw(nn.Module):
    """A block without children."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.weight)


class Tupled(Residual):
    """Returns its second argument too, and a cache that there is not."""

    def forward(self, x: Tensor, bias: Tensor, flag: bool = True) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return super().forward(x) + 0.0 * bias, bias, None


def listed(build: Callable[[int], nn.Module], number: int = 6) -> nn.ModuleList:
    return nn.ModuleList(build(i) for i in range(number))


def in_turn(net: nn.Module, x: Tensor) -> Tensor:
    for block in net.layers:
        x = block(x)
    return x


def as_pairs(net: nn.Module, x: Tensor) -> Tensor:
    for first, second in net.layers:
        x = x + first(x)
        x = second(x) + x
    return x


def with_norms(net: nn.Module, x: Tensor) -> Tensor:
    for norm, attention, other, mlp in net.layers:
        x = x + attention(norm(x))
        x = x + mlp(other(x))
    return x


def by_name(net: nn.Module, x: Tensor) -> Tensor:
    for number in range(6):
        x = getattr(net, f"block{number}")(x)
    return x


def by_key(net: nn.Module, x: Tensor) -> Tensor:
    for number in range(6):
        x = net.layers[f"b{number}"](x)
    return x


def values(net: nn.Module, x: Tensor) -> Tensor:
    for block in net.layers.values():
        x = block(x)
    return x


def by_index(net: nn.Module, x: Tensor) -> Tensor:
    for number in range(6):
        x = net.layers[number](x)
    return x


def zipped(net: nn.Module, x: Tensor) -> Tensor:
    for norm, block in zip(net.norms, net.layers, strict=True):
        x = x + block(norm(x))
    return x


def post_norms(net: nn.Module, x: Tensor) -> Tensor:
    for norm, block in zip(net.norms, net.layers, strict=True):
        x = norm(x + block(x))
    return x


def with_gains(net: nn.Module, x: Tensor) -> Tensor:
    for number, block in enumerate(net.layers):
        x = x + net.gains[number] * block(F.layer_norm(x, (WIDTH,)))
    return x


def features(net: nn.Module, x: Tensor) -> Tensor:
    kept = []
    for number, block in enumerate(net.layers):
        x = block(x)
        if number in (1, 3, 5):
            kept.append((number + 1) * x)
    return torch.stack(kept).sum(0)


def u_net(net: nn.Module, x: Tensor) -> Tensor:
    kept = []
    for number, block in enumerate(net.layers):
        if number < 3:
            x = block(x)
            kept.append(x)
        else:
            x = block(x + kept.pop())
    return x


def tuples(net: nn.Module, x: Tensor) -> Tensor:
    bias = x.mean()
    for number in range(6):
        x, bias, _ = net.layers[number](x, bias, flag=True)
    return x + bias


def layers_outside(net: nn.Module, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = x + layer(x).relu()
    return x


def alternating(number: int) -> nn.Module:
    return Residual(Mlp() if number % 2 else Attention())


def attributes(build: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
    return {f"block{i}": build(i) for i in range(6)}


PLAIN, OUTSIDE = "plain", "outside"
# name -> network, name of the chain, form, types of the branches of a block
NETS: dict[str, tuple[Callable[[], Net], str, str, list[str]]] = {
    "two classes": (lambda: Net(in_turn, layers=listed(alternating)), "layers:0-5/2", "compact", [PLAIN] * 2),
    "two classes in nn.Sequential": (
        lambda: Net(in_turn, layers=nn.Sequential(*map(alternating, range(6)))), "layers:0-5/2", "compact", [PLAIN] * 2
    ),
    "local, local, global": (
        lambda: Net(in_turn, layers=listed(lambda i: Residual(Attention() if i % 3 == 2 else Mlp()), 9)),
        "layers:0-8/3", "compact", [PLAIN] * 3,
    ),
    "a stem before them": (
        lambda: Net(in_turn, layers=listed(lambda i: alternating(i) if i else nn.Linear(WIDTH, WIDTH), 7)),
        "layers:1-6/2", "compact", [PLAIN] * 2,
    ),
    "pairs in a list": (
        lambda: Net(as_pairs, layers=listed(lambda _: nn.ModuleList([PreNorm(Attention()), PreNorm(Mlp())]))),
        "layers:0-5", "compact", [OUTSIDE] * 2,
    ),
    "pairs in nn.Sequential": (
        lambda: Net(in_turn, layers=listed(lambda _: nn.Sequential(Residual(Attention()), Residual(Mlp())))),
        "layers:0-5", "compact", [PLAIN] * 2,
    ),
    "four in a list": (
        lambda: Net(
            with_norms,
            layers=listed(
                lambda _: nn.ModuleList([nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), Mlp()]), 3
            ),
        ),
        "layers:0-2", "compact", [OUTSIDE] * 2,
    ),
    "attributes": (
        lambda: Net(by_name, **attributes(lambda _: Residual(Mlp()))), ":block0-block5", "in_place", [PLAIN]
    ),
    "attributes of two classes": (
        lambda: Net(by_name, **attributes(alternating)), ":block0-block5/2", "in_place", [PLAIN] * 2
    ),
    "a dict by key": (
        lambda: Net(by_key, layers=nn.ModuleDict({f"b{i}": Residual(Mlp()) for i in range(6)})),
        "layers:b0-b5", "in_place", [PLAIN],
    ),
    "a dict's values": (
        lambda: Net(values, layers=nn.ModuleDict({f"b{i}": Residual(Mlp()) for i in range(6)})),
        "layers:b0-b5", "compact", [PLAIN],
    ),
    "a stage": (
        lambda: Net(lambda net, x: net.layers(x), layers=Stage(*(Residual(Mlp()) for _ in range(6)))),
        "layers:layer_0-layer_5", "compact", [PLAIN],
    ),
    "a list with a forward": (
        lambda: Net(lambda net, x: net.layers(x), layers=Stack(Residual(Mlp()) for _ in range(6))),
        "layers:0-5", "compact", [PLAIN],
    ),
    "by index": (lambda: Net(by_index, layers=listed(lambda _: Residual(Mlp()))), "layers:0-5", "in_place", [PLAIN]),
    "features": (lambda: Net(features, layers=listed(lambda _: Residual(Mlp()))), "layers:0-5", "in_place", [PLAIN]),
    "a u-net": (lambda: Net(u_net, layers=listed(lambda _: Residual(Mlp()))), "layers:0-5", "in_place", [PLAIN]),
    "tuples": (lambda: Net(tuples, layers=listed(lambda _: Tupled(Mlp()))), "layers:0-5", "in_place", [PLAIN]),
    "norms in another list": (
        lambda: Net(zipped, layers=listed(lambda _: Mlp()), norms=listed(lambda _: nn.LayerNorm(WIDTH))),
        "layers:0-5", "in_place", [OUTSIDE],
    ),
    "norms behind the sum": (
        lambda: Net(post_norms, layers=listed(lambda _: Mlp()), norms=listed(lambda _: nn.LayerNorm(WIDTH))),
        "layers:0-5", "in_place", [OUTSIDE],
    ),
    "gains by position": (
        lambda: Net(
            with_gains, layers=listed(lambda _: Mlp()),
            gains=nn.ParameterList(nn.Parameter(torch.rand(WIDTH)) for _ in range(6)),
        ),
        "layers:0-5", "in_place", [OUTSIDE],
    ),
    "single layers": (
        lambda: Net(layers_outside, layers=listed(lambda _: nn.Linear(WIDTH, WIDTH))),
        "layers:0-5", "compact", [OUTSIDE],
    ),
    "parameters only": (lambda: Net(in_turn, layers=listed(lambda _: Raw())), "layers:0-5", "compact", [PLAIN]),
}  # fmt: skip


def chosen(build: Callable[[], nn.Module], names: Sequence[str] = ()) -> tuple[nn.Module, tuple[Chain, ...]]:
    model = build().eval()
    return model, choose_checked(model, names, X)


@pytest.mark.parametrize("name", NETS)
def test_found_with_an_example(name: str) -> None:
    """The default chain, its form, its branches, and the same names in the shortest sub-network."""
    build, chain_name, form, types = NETS[name]
    model, (chain,) = chosen(build)
    assert (chain.name, chain.form) == (chain_name, form)
    assert [skip_type for _, skip_type in chain.scaled(0)] == types
    subnet = Subnet(model, (chain,), (1,))
    subnet.load(tensors_of(model), ((1,),))
    tensors = tensors_of(model)
    of_block = [
        {name for name in tensors if any(name.startswith(f"{member}.") for member in chain.members(block))}
        for block in range(chain.num_blocks)
    ]
    assert all(of_block)
    assert subnet.state(((1,),)).keys() == tensors.keys() - set().union(*of_block) | of_block[1]


@pytest.mark.parametrize("name", NETS)
def test_scaled_as_by_hand(name: str) -> None:
    """Scaling the branches of the full network = multiplying the last layer of each, for branches that end in one."""
    model, (chain,) = chosen(NETS[name][0])
    scale_branches(model, (chain,), (0.5,))
    scaled = model(X)
    scales, records = scales_of(model), json.loads(json.dumps(records_of(model)))
    assert records == records_for(chain, 0.5)
    assert set(scales.values()) == {0.5}
    for module in list(model.modules()):
        unhook(module)
    assert scales_of(model) == {}
    assert not torch.equal(model(X), scaled)
    assert torch.equal(scale_blocks(model, records)(X), scaled)
    for module in list(model.modules()):
        unhook(module)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention):
                module.o.weight.mul_(0.5), module.o.bias.mul_(0.5)
            elif isinstance(module, Mlp):
                module.down.weight.mul_(0.5), module.down.bias.mul_(0.5)
    if name not in ("single layers", "parameters only"):
        torch.testing.assert_close(model(X), scaled)


@pytest.mark.parametrize("name", [name for name, case in NETS.items() if case[2] == "in_place"])
def test_in_place_blocks_stand_at_their_positions(name: str) -> None:
    """Names follow the blocks that are held; modules and parameters stay the same objects."""
    model, (chain,) = chosen(NETS[name][0])
    subnet, slots = Subnet(model, (chain,), (2,)), 2 * chain.period
    modules, parameters = {}, {}
    for held in ((0, 1), (1, 2), (0, 2)):
        subnet.load(tensors_of(model), (held,))
        inside = [member for block in held for member in chain.members(block)]
        present = {n: subnet.model.get_submodule(n) for b in range(chain.num_blocks) for n in chain.members(b)}
        assert [n for n, module in present.items() if not isinstance(module, Bypass)] == inside
        ids = [id(present[member]) for member in inside]
        assert modules.setdefault("ids", ids) == ids
        assert len(set(ids)) == slots
        places = {(place.key, place.slot): id(p) for p, place in subnet.parameter_places()}
        assert parameters.setdefault("places", places) == places
        subnet.check_attached()
        for tensor_name, tensor in subnet.state((held,)).items():
            assert torch.equal(tensor, tensors_of(model)[tensor_name])
            assert torch.equal(tensor, subnet.model.state_dict()[tensor_name])


def test_rows_that_repeat() -> None:
    def found(text: str) -> list[tuple[int, int, int]]:
        return list(spans([None if letter == "." else letter for letter in text]))

    assert found("aaaa") == [(0, 4, 1)]
    assert found("ababab") == [(0, 6, 2)]
    assert found("xababay") == [(1, 5, 2)]
    assert found("aabaab") == [(0, 2, 1), (3, 5, 1), (0, 6, 3)]
    assert found("a.a.a.") == []
    assert found("abcd") == found("") == found("a") == found("..") == []


def test_without_an_example() -> None:
    """What can only be called by name is in place; what has its skip connection outside cannot be found."""
    for name in ("two classes", "local, local, global", "pairs in nn.Sequential", "by index", "parameters only"):
        (chain,) = choose_chains(NETS[name][0]())
        assert (chain.name, chain.form) == (NETS[name][1], "compact")
    for name in ("attributes", "attributes of two classes", "a dict by key", "a dict's values", "a stage"):
        (chain,) = choose_chains(NETS[name][0]())
        assert (chain.name, chain.form) == (NETS[name][1], "in_place")
    for name in ("pairs in a list", "norms in another list"):
        with pytest.raises(UserError, match=r"layers:0-5 is a run of equal blocks, but .*zero.*, give `example=`"):
            choose_chains(NETS[name][0]())


def test_three_repeats_come_before_a_run_within_one() -> None:
    def found(number: int) -> list[str]:
        net = Net(in_turn, layers=listed(lambda i: Residual(Attention() if i % 6 == 5 else Mlp()), number))
        return [chain.name for chain in find_chains(net)]

    assert found(18)[0] == "layers:0-17/6"
    assert found(12)[0] == "layers:0-4"


def test_a_dict_with_numbers_as_keys() -> None:
    net = Net(values, layers=nn.ModuleDict({str(i + 1): Residual(Mlp()) for i in range(4)}))
    (chain,) = choose_chains(net, ("layers:1-4",))
    assert (chain.name, chain.members(0)) == ("layers:1-4", ("layers.1",))
    assert choose_chains(net, ("layers:2-3",))[0].members(0) == ("layers.2",)


def test_names() -> None:
    build = NETS["two classes"][0]
    for name in ("layers", "layers:0-5", "layers:0-5/2"):
        assert choose_chains(build(), (name,))[0].name == "layers:0-5/2"
    (part,) = choose_chains(build(), ("layers:2-5",))
    assert (part.name, part.num_blocks, part.members(1)) == ("layers:2-5/2", 2, ("layers.4", "layers.5"))
    with pytest.raises(UserError, match=r"blocks 1 and 2 of layers differ in .*; found: layers:0-5/2"):
        choose_chains(build(), ("layers:1-4",))
    net = NETS["attributes"][0]()
    for name in (":block0-block5", ":1-6", ""):
        assert choose_chains(net, (name,))[0].name == ":block0-block5"
    assert choose_chains(net, (":block2-block4",))[0].members(0) == ("block2",)
    with pytest.raises(UserError, match=r"chain ':block2-blockX' does not have the form"):
        choose_chains(net, (":block2-blockX",))
    assert [chain.name for chain in find_chains(net)] == [":block0-block5"]


class Factor(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2**0.5


class Gate(Residual):
    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.norm(x))
        return x * (1 - gate) + gate * self.inner(x)


def sigmoid_outside(net: nn.Module, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = x + layer(x).sigmoid()
    return x


def gelu_outside(net: nn.Module, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = x + F.gelu(layer(x))
    return x


def decayed(net: nn.Module, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = 0.8 * x + 0.6 * layer(x)
    return x


@pytest.mark.parametrize(
    ("loop", "build", "reason"),
    [
        (in_turn, lambda: Factor(Mlp()), r"not x \+ f\(x\): with all its weights zero a block returns 0.707 times its"),
        (in_turn, lambda: Gate(Mlp()), r"a block returns 0.5 times its input: a skip connection with a factor or a"),
        (in_turn, Mlp, r"returns zero, and with zero in its place the network does not go on with the state"),
        (decayed, Mlp, r"returns zero, and with zero in its place the network does not go on with the state"),
        (sigmoid_outside, Mlp, r"with zero in its place the network does not go on with the state from before it"),
        (gelu_outside, Mlp, r"or it does more with it than adding it"),
    ],
)  # fmt: skip
def test_refused_with_the_true_reason(loop: Loop, build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        chosen(lambda: Net(loop, layers=listed(lambda _: build())))


def test_the_log_says_what_is_in_place(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="resist"):
        chosen(NETS["two classes"][0])
        assert caplog.messages == []
        chosen(NETS["by index"][0])
    assert [text[:47] for text in caplog.messages] == ["chain layers:0-5: the network takes its blocks "]


def test_attributes_that_the_network_reads_are_those_of_the_bypassed_block() -> None:
    def loop(net: nn.Module, x: Tensor) -> Tensor:
        for number in range(6):
            x = net.layers[number](x) + net.layers[number].offset
        return x

    def build() -> nn.Module:
        net = Net(loop, layers=listed(lambda _: Residual(Mlp())))
        for number, block in enumerate(net.layers):
            block.offset = 0.1 * number
        return net

    _, (chain,) = chosen(build)
    assert chain.form == "in_place"


def test_outputs_that_a_bypass_cannot_give() -> None:
    class Weights(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x.softmax(-1)

    net = nn.Sequential(Weights(Mlp()), Weights(Mlp()))
    (chain,) = choose_chains(net)
    assert in_place(chain, net) is None
