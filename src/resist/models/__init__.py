"""Networks by name: pre-activation ResNets, and networks of other libraries.

`build(name, ...)` is what `resist train --model NAME` trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from resist.errors import UserError
from resist.models.preact_cifar import DEPTHS, PreActResNet
from resist.models.preact_imagenet import IMAGENET_DEPTHS, PreActResNetImageNet
from resist.models.third_party import build_third_party, is_third_party

__all__ = ["MODELS", "PreActResNet", "PreActResNetImageNet", "build"]


@dataclass(frozen=True)
class Shape:
    """Depth and width of a pre-activation ResNet.

    Attributes:
        sections: Number of blocks in each of the four sections.
        width: Channels of the stem.
        final_norm: Apply a norm and a ReLU before the last pooling.
        photographs: Use bottleneck blocks and a stem for large images (`PreActResNetImageNet`).
    """

    sections: tuple[int, ...]
    width: int = 64
    final_norm: bool = False
    photographs: bool = False


# preact_small is for laptops and small images: 32 layers, trained on digits in a minute on two cores.
MODELS = {
    "preact_small": Shape((2, 2, 9, 2), width=16, final_norm=True),
    **{name: Shape(sections) for name, sections in DEPTHS.items()},
    **{name: Shape(sections, final_norm=True, photographs=True) for name, sections in IMAGENET_DEPTHS.items()},
}


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    sections: Sequence[int] = (),
    width: int | None = None,
    final_norm: bool = False,
    image_size: int | None = None,
) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: A key of `MODELS`, or `LIBRARY:NAME` (see `resist.models.third_party`).
        num_classes: Number of logits.
        in_channels: Channels of the images.
        sections: Number of blocks in each of the four sections; default: those of the named network.
        width: Channels of the stem; default: that of the named network.
        final_norm: Add a norm and a ReLU before the last pooling where the named network has none.
        image_size: Height and width of the images in pixels, for networks of other libraries that are built for one
            size.

    Returns:
        A network that maps images (batch, in_channels, height, width) to logits (batch, num_classes).

    Raises:
        UserError: The name is unknown, a value is out of bounds, or an option has no effect with this network.
    """
    if is_third_party(name):
        for option, given in (("sections", sections), ("width", width is not None), ("final-norm", final_norm)):
            if given:
                raise UserError(
                    f"--{option} has no effect with model={name!r}, whose library defines its shape; remove it"
                )
        return build_third_party(name, num_classes=num_classes, image_size=image_size)
    if name not in MODELS:
        raise UserError(
            f"model={name!r} is not known; choose one of {', '.join(MODELS)}, or torchvision:NAME, timm:NAME, "
            "transformers:TYPE"
        )
    shape = MODELS[name]
    if sections and (len(sections) != 4 or min(sections) < 1):
        raise UserError(f"sections={' '.join(map(str, sections))}; give four numbers of blocks, each at least 1")
    width = shape.width if width is None else width
    if width < 1 or num_classes < 1:
        raise UserError(f"width={width}, num_classes={num_classes}; both must be at least 1")
    sections = tuple(sections) or shape.sections
    if shape.photographs:
        return PreActResNetImageNet(sections, num_classes, width=width, in_channels=in_channels)
    return PreActResNet(
        sections, num_classes, width=width, in_channels=in_channels, final_norm=final_norm or shape.final_norm
    )
