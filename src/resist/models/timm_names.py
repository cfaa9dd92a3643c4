"""Weights of our ImageNet networks under the names that timm's resnetv2 gives them, and back.

    stem.weight             stem.conv.weight
    layer3.1.conv2.weight   stages.2.blocks.1.conv2.weight
    layer3.0.shortcut...    stages.2.blocks.0.downsample.conv...
    head.weight             head.fc.weight, there that of a 1x1 convolution

Tensors are shared, not copied. Names that the other side does not have are left as they are.
"""

import re
from collections.abc import Mapping

from torch import Tensor


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `state_dict` of a `PreActResNetImageNet` as timm's network of the same sections takes it."""
    return {
        timm_name(name): tensor[:, :, None, None] if name == "head.weight" else tensor
        for name, tensor in state.items()
    }


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `state_dict` of one of timm's resnetv2 as a `PreActResNetImageNet` takes it."""
    return {
        our_name(name): tensor.flatten(1) if name == "head.fc.weight" else tensor for name, tensor in state.items()
    }


def timm_name(ours: str) -> str:
    name = re.sub(r"^layer(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.", ours)
    name = name.replace(".shortcut.", ".downsample.conv.")
    return re.sub(r"^(stem|head)\.", lambda found: {"stem": "stem.conv.", "head": "head.fc."}[found[1]], name)


def our_name(timms: str) -> str:
    name = re.sub(r"^stages\.(\d+)\.blocks\.", lambda found: f"layer{int(found[1]) + 1}.", timms)
    name = name.replace(".downsample.conv.", ".shortcut.")
    return re.sub(r"^(stem\.conv|head\.fc)\.", lambda found: f"{found[1][:4]}.", name)
