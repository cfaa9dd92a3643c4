"""Networks for photographs: equal to timm's, layer for layer, and the translation of names."""

import pytest
import torch
from torch import nn

from resist.blocks.chains import choose_chains
from resist.models import build
from resist.models.preact_imagenet import IMAGENET_DEPTHS, PreActBottleneck, PreActResNetImageNet
from resist.models.pretrained import from_timm, our_name, timm_name, to_timm
from resist.planning.plan import equal_capacities

# With 1,000 classes, as timm counts them; it has no 200, which is the 152 with 16 more blocks of section 2.
PARAMETERS = {50: 25_549_352, 101: 44_541_480, 152: 60_185_128, 200: 60_185_128 + 16 * 280_064}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **options: int) -> nn.Module:
    with torch.device("meta"):
        return build(name, **{"num_classes": 1000, **options})


@pytest.mark.parametrize(("depth", "parameters"), PARAMETERS.items())
def test_parameters_and_chains(depth: int, parameters: int) -> None:
    model = on_meta(f"preact_resnet{depth}_imagenet")
    sections = IMAGENET_DEPTHS[f"preact_resnet{depth}_imagenet"]
    assert 3 * sum(sections) + 2 == depth
    assert count(model) == parameters
    assert [chain.name for chain in choose_chains(model)] == [f"layer3:1-{sections[2] - 1}"]
    assert count(model.get_submodule("layer3.1")) == 1_117_184


def test_both_long_sections_of_the_deepest_are_chains() -> None:
    chains = choose_chains(on_meta("preact_resnet200_imagenet"), ("layer2", "layer3"))
    assert [(chain.name, chain.num_blocks) for chain in chains] == [("layer2:1-23", 23), ("layer3:1-35", 35)]
    assert [equal_capacities(chain.num_blocks, 4) for chain in chains] == [(6,) * 4, (9,) * 4]


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_names_and_shapes_are_timms(depth: int) -> None:
    timm = pytest.importorskip("timm", reason="compares with timm's networks")
    with torch.device("meta"):
        timm_state = timm.create_model(f"resnetv2_{depth}").state_dict()
    ours = on_meta(f"preact_resnet{depth}_imagenet").state_dict()
    there = to_timm(ours)
    assert {name: tensor.shape for name, tensor in there.items()} == {n: t.shape for n, t in timm_state.items()}
    back = from_timm(there)
    assert {name: tensor.shape for name, tensor in back.items()} == {n: t.shape for n, t in ours.items()}
    assert all(our_name(timm_name(name)) == name for name in ours)


def test_logits_are_timms() -> None:
    timm = pytest.importorskip("timm", reason="compares with timm's networks")
    layers = {"layers": (2, 1, 3, 1), "channels": (32, 64, 128, 256), "stem_chs": 8, "num_classes": 7}
    timm_model = timm.models.resnetv2.ResNetV2(
        **layers, norm_layer=timm.layers.BatchNormAct2d, conv_layer=timm.layers.create_conv2d, stem_type=""
    )
    for module in timm_model.modules():
        if isinstance(module, nn.BatchNorm2d):  # nothing at its default, so that every weight shows
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.2, 1.8)
    nn.init.normal_(timm_model.head.fc.weight)
    ours = PreActResNetImageNet((2, 1, 3, 1), 7, width=8)
    ours.load_state_dict(from_timm(timm_model.state_dict()))
    images = torch.randn(3, 3, 64, 48, dtype=torch.float64)
    ours, timm_model = ours.double(), timm_model.double()
    torch.testing.assert_close(ours.eval()(images), timm_model.eval()(images))
    torch.testing.assert_close(ours.train()(images), timm_model.train()(images))
    timm_model.load_state_dict(to_timm(ours.state_dict()))


def test_a_block_by_hand() -> None:
    images = torch.randn(2, 8, 6, 6)
    for block in (PreActBottleneck(8, 2, 1).eval(), PreActBottleneck(8, 3, 2).eval()):
        inside = torch.relu(block.norm1(images))
        branch = block.conv3(torch.relu(block.norm3(block.conv2(torch.relu(block.norm2(block.conv1(inside)))))))
        skip = images if block.shortcut is None else block.shortcut(inside)
        assert torch.equal(block(images), skip + branch)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (33, 95)])
def test_any_size_of_image(height: int, width: int) -> None:
    model = build("preact_resnet50_imagenet", num_classes=5, depths=(1, 1, 2, 1), width=2)
    assert model(torch.randn(2, 3, height, width)).shape == (2, 5)
