"""Chains: found in networks of all kinds, and named by the user."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from resist.chains import choose_chains, find_chains
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


def names(model: nn.Module) -> list[str]:
    return [chain.name for chain in find_chains(model)]


def model_of(*blocks: nn.Module, container: type = nn.Sequential) -> nn.Module:
    model = nn.Module()
    model.body = container(*blocks) if container is nn.Sequential else container(blocks)
    return model


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_neighbours_of_one_kind_are_a_chain(container: type) -> None:
    model = model_of(Block(3), Block(), Block(), Block(), nn.Linear(4, 4), nn.Linear(4, 4), container=container)
    (chain,) = find_chains(model)
    assert (chain.name, chain.num_blocks, chain.block_name(0)) == ("body:1-3", 3, "body.1")


@pytest.mark.parametrize(
    "odd",
    [
        Block(5), Wide(), Block().double(), Block().requires_grad_(False),
        nn.Identity(), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.ModuleList([Block()]),
    ],
    ids=["shape", "class", "type", "frozen", "no weights", "leaf", "no skip", "list"],
)
def test_what_differs_ends_a_chain(odd: nn.Module) -> None:
    assert names(model_of(Block(), Block(), odd, Block(), Block(), Block())) == ["body:3-5", "body:0-1"]


def test_lone_and_bare_modules_are_no_chain() -> None:
    assert names(model_of(Block(), Block(5), Block())) == []
    assert names(model_of(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)))) == []


def test_tied_blocks_are_no_chain() -> None:
    """Weights that two blocks have in common cannot lie in two slots."""
    same = Block()
    assert names(model_of(same, same, same)) == []
    first, second = Block(), Block()
    second.linear.weight = first.linear.weight
    assert names(model_of(first, second, Block(), Block())) == ["body:2-3"]


def test_the_longest_then_the_heaviest_comes_first() -> None:
    model = nn.ModuleDict({
        "short": nn.Sequential(Block(9), Block(9)),
        "light": nn.Sequential(Block(2), Block(2), Block(2)),
        "heavy": nn.Sequential(Block(7), Block(7), Block(7)),
    })
    assert names(model) == ["heavy:0-2", "light:0-2", "short:0-1"]
    assert [chain.name for chain in choose_chains(model)] == ["heavy:0-2"]


def test_a_model_may_itself_be_the_container() -> None:
    (chain,) = find_chains(nn.Sequential(Block(), Block()))
    assert (chain.container, chain.block_name(1)) == ("", "1")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (torchvision.models.resnet18, "layer1:0-1"),
        (torchvision.models.resnet50, "layer3:1-5"),
        (torchvision.models.resnet101, "layer3:1-22"),
        (torchvision.models.resnet152, "layer3:1-35"),
        (torchvision.models.mobilenet_v2, "features:8-10"),
    ],
)
def test_torchvision(build: Callable[[], nn.Module], expected: str) -> None:
    with torch.device("meta"):
        model = build()
    assert choose_chains(model)[0].name == expected


@pytest.mark.parametrize("depth", ["resnet18", "resnet50", "resnet101"])
def test_a_strided_block_is_never_in_a_chain(depth: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(depth)
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
    with torch.device("meta"):
        model = torchvision.models.resnet101()
    (found,) = choose_chains(model, (chain,))
    assert (found.container, found.first, found.last) == (chain.partition(":")[0], first, last)
    assert found.block_name(0) == f"{found.container}.{first}"


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("layer9", r"chain 'layer9': 'layer9' has no run of residual blocks; found: layer3:1-5, "),
        ("fc", r"'fc' has no run"),
        ("layer3:0-5", r"blocks 0 and 1 of layer3 differ in parameter conv1.weight: .256, 512, 1, 1. and .256, 1024, 1, 1."),
        ("layer3:1-9", r"not there"),
        ("layer3:5-1", r"does not read NAME:FIRST-LAST, as in layer3:1-22"),
        ("layer3:1-1", r"does not read NAME:FIRST-LAST"),
        ("layer3:a-b", r"does not read NAME:FIRST-LAST"),
        ("layer3:1", r"does not read NAME:FIRST-LAST"),
    ],
)
def test_refused_names(chain: str, message: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    with pytest.raises(UserError, match=message) as raised:
        choose_chains(model, (chain,))
    assert "\n" not in str(raised.value)


def test_a_model_without_a_chain() -> None:
    with pytest.raises(UserError, match=r"has no chain of residual blocks, so there is nothing to deal out: no nn.Seq"):
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
    with pytest.raises(UserError, match=r"chain body.2.inner:0-2 lies behind body:0-1 in an nn.ModuleList"):
        choose_chains(model, ("body:0-1", "body.2.inner"))
