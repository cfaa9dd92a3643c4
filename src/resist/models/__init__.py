"""Networks by name. `build(name, ...)` gives what the command line trains: ours, and those of other libraries."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from resist.errors import UserError
from resist.models.preact_cifar import DEPTHS, PreActResNet
from resist.models.preact_imagenet import IMAGENET_DEPTHS, PreActResNetImageNet
from resist.models.third_party import build_foreign, is_foreign

__all__ = ["MODELS", "PreActResNet", "PreActResNetImageNet", "build"]


@dataclass(frozen=True)
class Shape:
    """sections: blocks in each; width: channels of the first; final_norm: norm and ReLU before the last pooling;
    photographs: bottleneck blocks and a stem for large images."""

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
    """The network `name`; `sections`, `width` and `final_norm` replace its own where given.

    image_size: height and width of the images, for networks of other libraries that are built for one size.
    Raises UserError for what cannot be built.
    """
    if is_foreign(name):
        for option, given in (("sections", sections), ("width", width is not None), ("final-norm", final_norm)):
            if given:
                raise UserError(
                    f"--{option} says nothing to model={name!r}, whose shape is its library's; leave it out"
                )
        return build_foreign(name, num_classes=num_classes, image_size=image_size)
    if name not in MODELS:
        raise UserError(
            f"model={name!r} is not known; choose one of {', '.join(MODELS)}, or torchvision:NAME, timm:NAME, "
            "transformers:TYPE"
        )
    shape = MODELS[name]
    if sections and (len(sections) != 4 or min(sections) < 1):
        raise UserError(f"sections={' '.join(map(str, sections))} is not four numbers of blocks, each at least 1")
    width = shape.width if width is None else width
    if width < 1 or num_classes < 1:
        raise UserError(f"width={width} and num_classes={num_classes} have to be at least 1")
    sections = tuple(sections) or shape.sections
    if shape.photographs:
        return PreActResNetImageNet(sections, num_classes, width=width, in_channels=in_channels)
    return PreActResNet(
        sections, num_classes, width=width, in_channels=in_channels, final_norm=final_norm or shape.final_norm
    )
