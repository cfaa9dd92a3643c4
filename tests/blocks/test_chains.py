"""Chains: found in any network, or named by the user."""

from collections.abc import Sequence
from functools import cache

import pytest
import torch
import torchvision
from torch import Tensor, nn

from resist.blocks.chains import choose_chains, find_chains
from resist.blocks.compatibility import Varying
from resist.errors import UserError


class Block(nn.Module):
    def __init__(self, width: int = 4, slope: float = 0.0, label: str = "") -> None:
        super().__init__()
        self.linear, self.slope, self.label = nn.Linear(width, width), slope, label

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.leaky_relu(self.linear(x), self.slope)


class Wide(Block):
    pass


class Nest(nn.Module):
    """A block with a chain inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Sequential(Block(), Block(), Block()), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.inner(x))


@cache
def on_meta(name: str) -> nn.Module:
    """A network of torchvision without weights, built once."""
    with torch.device("meta"):
        return torchvision.models.get_model(name)


def names(model: nn.Module) -> list[str]:
    return [chain.name for chain in find_chains(model)]


def model_of(*blocks: nn.Module, container: type = nn.Sequential) -> nn.Module:
    model = nn.Module()
    model.body = container(*blocks) if container is nn.Sequential else container(blocks)
    return model


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_neighbors_of_one_class_are_a_chain(container: type) -> None:
    model = model_of(Block(3), Block(), Block(), Block(), nn.Linear(4, 4), nn.Linear(4, 4), container=container)
    (chain,) = find_chains(model)
    assert (chain.name, chain.num_blocks, chain.block_name(0)) == ("body:1-3", 3, "body.1")


@pytest.mark.parametrize(
    "odd",
    [
        Block(5),
        Wide(),
        Block().double(),
        Block().requires_grad_(False),
        nn.Identity(),
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4)),
        nn.ModuleList([Block()]),
    ],
    ids=["shape", "class", "type", "frozen", "no weights", "leaf", "no skip", "list"],
)
def test_what_differs_ends_a_chain(odd: nn.Module) -> None:
    assert names(model_of(Block(), Block(), odd, Block(), Block(), Block())) == ["body:3-5", "body:0-1"]


def test_attributes_that_differ_go_with_their_block() -> None:
    model = model_of(Block(slope=0.1), Block(slope=0.2, label="x"), Block(slope=0.2))
    (chain,) = find_chains(model)
    assert (chain.name, chain.skip_type) == ("body:0-2", "plain")
    assert [(one.module, one.name, one.values) for one in chain.varying] == [
        ("", "slope", (0.1, 0.2, 0.2)), ("", "label", ("", "x", "")),
    ]  # fmt: skip
    other = Block()
    for one in chain.varying:
        one.put(other, 1)
    assert (other.slope, other.label) == (0.2, "x")
    part = chain.part(1, 2)
    assert [(one.name, one.values) for one in part.varying] == [("label", ("x", ""))]
    assert choose_chains(model, ("body:1-2",))[0].varying == part.varying


def test_a_value_is_put_as_a_copy() -> None:
    one = Varying("linear", "sizes", ([1, 2], [3]))
    block = Block()
    one.put(block, 0)
    block.linear.sizes.append(9)  # type: ignore[operator,union-attr]
    assert one.values == ([1, 2], [3])


def test_no_skip_connection_no_chain() -> None:
    """The default is the longest chain of residual blocks, even if there is a longer run of other blocks."""

    class Bare(Block):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(self.linear(x))

    model = nn.ModuleDict({"bare": nn.Sequential(*(Bare() for _ in range(5))), "good": nn.Sequential(Block(), Block())})
    assert names(model) == ["good:0-1"]
    assert choose_chains(model)[0].name == "good:0-1"
    with pytest.raises(
        UserError, match=r"'bare:0-4': its blocks have no skip connection: .* give `example=`; found: good"
    ):
        choose_chains(model, ("bare:0-4",))
    with pytest.raises(UserError, match=r"partition: body:0-2 is a run of equal blocks, but its blocks have no"):
        choose_chains(model_of(Bare(), Bare(), Bare()))


def test_blocks_with_and_without_a_skip_connection() -> None:
    """A flag that switches the skip connection off ends the chain."""

    class Switched(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.label == "on" else self.linear(x)

    on = [Switched(label="on") for _ in range(5)]
    assert names(model_of(Switched(label="off"), *on[:2], Switched(label="off"), *on[2:])) == ["body:4-6", "body:1-2"]


def test_blocks_that_cannot_be_tested_have_to_be_named() -> None:
    class Fussy(Block):
        def forward(self, x: Tensor, size: int) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    model = model_of(*(Fussy(slope=0.1 * i) for i in range(4)))
    with pytest.raises(UserError, match=r"the blocks of body:0-3 may be residual, but .*; name the chain \(body:0-3\)"):
        choose_chains(model)
    (chain,) = choose_chains(model, ("body",))
    assert (chain.skip_type, chain.num_blocks, len(chain.varying)) == ("unknown", 4, 1)
    with_good = nn.ModuleDict({"fussy": model, "good": nn.Sequential(Block(), Block())})
    assert [chain.skip_type for chain in find_chains(with_good)] == ["plain", "unknown"]
    assert choose_chains(with_good)[0].name == "good:0-1"


def test_functions_and_the_values_of_tables_go_with_their_block() -> None:
    blocks = [Block() for _ in range(6)]
    blocks[2].act = torch.relu
    blocks[3].act = torch.tanh
    for block in blocks[4:]:
        block.register_buffer("table", torch.tensor([1, 2]))
    assert sorted(names(model_of(*blocks))) == ["body:0-3", "body:4-5"]
    blocks[5].register_buffer("table", torch.tensor([2, 1]))
    assert sorted(names(model_of(*blocks))) == ["body:0-3", "body:4-5"]


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ((Block(3), Block(4)), r"blocks 0 and 1 of body differ in parameter linear.weight: \(3, 3\) and \(4, 4\)"),
        ((Block(), Block().requires_grad_(False)), r"parameter linear.weight"),
        ((Block(), Wide()), r"no nn.Sequential or nn.ModuleList has two neighboring blocks of the same class"),
        ([Block()] * 2, r"body blocks 0 to 1 have parameters in common with one another"),
    ],
)
def test_the_nearest_miss_is_reported(blocks: Sequence[nn.Module], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        choose_chains(model_of(*blocks))
    assert "\n" not in str(raised.value)


def test_caveats_of_scaling() -> None:
    resnet, vit = on_meta("resnet50"), on_meta("vit_b_16")
    assert "relu(x + scale * f(x)) except where x + f(x) < 0" in choose_chains(resnet)[0].caveat
    assert choose_chains(vit)[0].caveat == ""
    post = model_of(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)))
    assert "not itself normalized" in choose_chains(post)[0].caveat


def test_lone_and_bare_modules_are_no_chain() -> None:
    assert names(model_of(Block(), Block(5), Block())) == []
    assert names(model_of(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)))) == []


def test_tied_blocks_are_no_chain() -> None:
    """Weights that two blocks share cannot be in two slots."""
    same = Block()
    assert names(model_of(same, same, same)) == []
    first, second = Block(), Block()
    second.linear.weight = first.linear.weight
    assert names(model_of(first, second, Block(), Block())) == ["body:2-3"]


def test_the_longest_then_the_heaviest_comes_first() -> None:
    model = nn.ModuleDict(
        {
            "short": nn.Sequential(Block(9), Block(9)),
            "light": nn.Sequential(Block(2), Block(2), Block(2)),
            "heavy": nn.Sequential(Block(7), Block(7), Block(7)),
        }
    )
    assert names(model) == ["heavy:0-2", "light:0-2", "short:0-1"]
    assert [chain.name for chain in choose_chains(model)] == ["heavy:0-2"]


def test_a_model_may_itself_be_the_container() -> None:
    (chain,) = find_chains(nn.Sequential(Block(), Block()))
    assert (chain.container, chain.block_name(1)) == ("", "1")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "layer1:0-1"),
        ("resnet50", "layer3:1-5"),
        pytest.param("resnet101", "layer3:1-22", marks=pytest.mark.slow),
        pytest.param("resnet152", "layer3:1-35", marks=pytest.mark.slow),
        ("mobilenet_v2", "features:8-10"),
        pytest.param("convnext_tiny", "features.5:0-8", marks=pytest.mark.slow),
        pytest.param("swin_t", "features.5:0-5", marks=pytest.mark.slow),
        ("efficientnet_b0", "features.6:1-3"),
    ],
)
def test_torchvision(name: str, expected: str) -> None:
    assert choose_chains(on_meta(name))[0].name == expected


@pytest.mark.parametrize("depth", ["resnet18", "resnet50", "resnet101"])
def test_a_strided_block_is_never_in_a_chain(depth: str) -> None:
    model = on_meta(depth)
    for chain in find_chains(model):
        for block in range(chain.num_blocks):
            parts = model.get_submodule(chain.block_name(block)).modules()
            assert all(part.stride == (1, 1) for part in parts if isinstance(part, nn.Conv2d))
        assert chain.first >= 1 or chain.container == "layer1"


@pytest.mark.parametrize(
    ("chain", "first", "last"),
    [("layer3", 1, 22), ("layer3:1-22", 1, 22), ("layer3:4-9", 4, 9), ("layer2", 1, 3)],
)
def test_a_chain_by_name(chain: str, first: int, last: int) -> None:
    (found,) = choose_chains(on_meta("resnet101"), (chain,))
    assert (found.container, found.first, found.last) == (chain.partition(":")[0], first, last)
    assert found.block_name(0) == f"{found.container}.{first}"


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("layer9", r"chain 'layer9': 'layer9' has no run of residual blocks; found: layer3:1-5, "),
        ("fc", r"'fc' has no run"),
        ("layer3:0-5", r"blocks 0 and 1 of layer3 differ in parameter conv1.weight: \(256, 512, 1, 1\) and \(256, 10"),
        ("layer3:1-9", r"do not exist"),
        ("layer3:5-1", r"does not have the form NAME:FIRST-LAST, as in layer3:1-22"),
        ("layer3:1-1", r"does not have the form NAME:FIRST-LAST"),
        ("layer3:a-b", r"does not have the form NAME:FIRST-LAST"),
        ("layer3:1", r"does not have the form NAME:FIRST-LAST"),
    ],
)
def test_refused_names(chain: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        choose_chains(on_meta("resnet50"), (chain,))
    assert "\n" not in str(raised.value)


def test_a_model_without_a_chain() -> None:
    with pytest.raises(
        UserError, match=r"has no chain of residual blocks, so there is nothing to partition: no nn.Seq"
    ):
        choose_chains(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"'x' has no run of residual blocks; found: none"):
        choose_chains(nn.Linear(2, 2), ("x",))


def test_nested_and_overlapping_chains() -> None:
    model = model_of(Nest(), Nest(), Nest())
    assert names(model) == ["body:0-2", "body.0.inner:0-2", "body.1.inner:0-2", "body.2.inner:0-2"]
    assert len(choose_chains(model, ("body.0.inner", "body.2.inner"))) == 2
    for pair in (("body", "body.1.inner"), ("body.1.inner", "body"), ("body:0-1", "body:1-2"), ("body", "body")):
        with pytest.raises(UserError, match="overlap; name each block once"):
            choose_chains(model, pair)
    apart = choose_chains(model, ("body:0-1", "body.2.inner"))
    assert [chain.name for chain in apart] == ["body:0-1", "body.2.inner:0-2"]


def test_a_chain_behind_another_in_a_module_list() -> None:
    model = model_of(Nest(), Nest(), Nest(), container=nn.ModuleList)
    assert len(choose_chains(model, ("body:1-2", "body.0.inner"))) == 2
    with pytest.raises(UserError, match=r"chain body.2.inner:0-2 comes after body:0-1 in an nn.ModuleList"):
        choose_chains(model, ("body:0-1", "body.2.inner"))


def test_chains_are_found_while_the_default_device_is_meta() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
        assert names(model) == names(torchvision.models.resnet18())
    assert names(model) == names(torchvision.models.resnet18())
