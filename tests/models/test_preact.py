"""The paper's networks, compared by their exact numbers of parameters."""

import pytest
import torch
from torch import nn

from resist.blocks.chains import choose_chains
from resist.errors import UserError
from resist.models import PreActResNet, build, read_model_args
from resist.models.preact_cifar import PreActBlock


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "num_blocks"), [("preact_resnet101", 22), ("preact_resnet152", 35), ("preact_resnet200", 49)]
)
@pytest.mark.parametrize("final_norm", [False, True])
def test_the_papers_networks(name: str, num_blocks: int, final_norm: bool) -> None:
    with torch.device("meta"):
        model = build(name, num_classes=100, final_norm=final_norm)
    chain = choose_chains(model)[0]
    norm = 2 * 512 if final_norm else 0
    assert (chain.name, chain.num_blocks) == (f"layer3:1-{num_blocks}", num_blocks)
    in_chain = [count(model.get_submodule(chain.block_name(block))) for block in range(num_blocks)]
    assert in_chain == [1_180_672] * num_blocks
    assert count(model) - sum(in_chain) == 15_422_116 + norm
    assert count(model) == 41_396_900 + norm + (num_blocks - 22) * 1_180_672


def test_a_block_by_hand() -> None:
    """x + conv(relu(norm(conv(relu(norm(x)))))); a block that changes the shape gives its convolution relu(norm(x))."""
    images = torch.randn(2, 4, 6, 6)
    for block in (PreActBlock(4, 4, 1).eval(), PreActBlock(4, 6, 2).eval()):
        inside = torch.relu(block.norm1(images))
        branch = block.conv2(torch.relu(block.norm2(block.conv1(inside))))
        skip = images if block.shortcut is None else block.shortcut(inside)
        assert torch.equal(block(images), skip + branch)


def test_shapes() -> None:
    model = build("preact_resnet101", num_classes=7, in_channels=1, depths=(1, 2, 3, 1), width=4)
    assert model(torch.randn(2, 1, 16, 24)).shape == (2, 7)
    assert [len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 2, 3, 1]
    with_norm = PreActResNet((1, 1, 1, 1), 3, width=2, final_norm=True)
    assert with_norm(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    halves = model.layer3(model.layer2(model.layer1(model.stem(torch.randn(1, 1, 16, 16)))))
    assert halves.shape == (1, 16, 4, 4)


def test_the_small_one() -> None:
    with torch.device("meta"):
        model = build("preact_small", num_classes=10)
    assert [len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4)] == [2, 2, 9, 2]
    assert (model.stem.out_channels, model.norm is not None) == (16, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet"}, r"`model=resnet` is not known; choose one of .*preact_resnet101"),
        ({"depths": (1, 2, 3)}, r"`model_args=depths=1,2,3`; give four numbers of blocks, each 1 to 10000"),
        ({"depths": (1, 2, 0, 1)}, r"`model_args=depths=1,2,0,1`; give"),
        ({"depths": (1, 1, 99999999999, 1)}, r"`model_args=depths=1,1,99999999999,1`; give"),
        ({"width": 0}, r"^`model_args=width=0`; must be 1 to 10000$"),
        ({"width": 10**20}, r"^`model_args=width=10+`; must be 1 to 10000$"),
        ({"depths": (1, 8, 1, 1), "zero_init": True}, r"^`model_args=zero_init` has no effect where the third section"),
        ({"num_classes": 0}, r"^`num_classes=0`; must be at least 1$"),
        ({"name": "preact_resnet50_imagenet", "final_norm": False}, r"final_norm=False is not possible with"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    options = {"name": "preact_resnet101", "num_classes": 10, **arguments}
    with pytest.raises(UserError, match=message):
        build(options.pop("name"), **options)  # type: ignore[arg-type]


def test_the_final_norm_can_be_removed() -> None:
    arguments = read_model_args("preact_small", ("final_norm=false",))
    with torch.device("meta"):
        assert build("preact_small", num_classes=10, **arguments).norm is None
        assert build("preact_small", num_classes=10).norm is not None


@pytest.mark.parametrize(("name", "last"), [("preact_small", "conv2"), ("preact_resnet50_imagenet", "conv3")])
def test_blocks_of_the_long_section_can_begin_as_the_identity(name: str, last: str) -> None:
    def seeded(*texts: str) -> nn.Module:
        torch.manual_seed(0)
        arguments = read_model_args(name, ("depths=1,2,3,1", "width=4", *texts))
        return build(name, num_classes=5, **arguments)

    plain, zero = seeded().state_dict(), seeded("zero_init=true")
    differ = {key for key, value in zero.state_dict().items() if not torch.equal(value, plain[key])}
    assert differ == {f"layer3.{block}.{last}.weight" for block in (1, 2)}
    section = zero.get_submodule("layer3")
    images = torch.randn(2, 16 if last == "conv2" else 64, 8, 8)
    assert torch.equal(section[1](images), images)
    assert [chain.name for chain in choose_chains(zero)] == ["layer3:1-2"]
    seeded("zero_init=false").load_state_dict(zero.state_dict())


def test_arguments_of_an_unknown_network() -> None:
    with pytest.raises(UserError, match="`model=resnet9` is not known"):
        read_model_args("resnet9", ("deep=3",))
    with pytest.raises(UserError, match=r"'8\.5' is not a whole number"):
        read_model_args("preact_small", ("width=8.5",))
