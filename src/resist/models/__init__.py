"""Networks by name: pre-activation ResNets, and networks of other libraries.

`build(name, ...)` builds the network that `resist train` trains.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from resist.errors import UserError
from resist.models.preact_cifar import DEPTHS, PreActResNet
from resist.models.preact_imagenet import IMAGENET_DEPTHS, PreActResNetImageNet
from resist.models.third_party import build_third_party, is_third_party

__all__ = ["MODELS", "PreActResNet", "PreActResNetImageNet", "build", "read_model_args"]


@dataclass(frozen=True)
class Shape:
    """Depth and width of a pre-activation ResNet.

    Attributes:
        depths: Number of blocks in each of the four sections.
        width: Channels of the stem.
        final_norm: Apply a norm and a ReLU before the last pooling.
        photographs: Use bottleneck blocks and a stem for large images (`PreActResNetImageNet`).
    """

    depths: tuple[int, ...]
    width: int = 64
    final_norm: bool = False
    photographs: bool = False


# preact_small is for laptops and small images: 32 layers, trained on digits in a minute on two cores.
MODELS = {
    "preact_small": Shape((2, 2, 9, 2), width=16, final_norm=True),
    **{name: Shape(depths) for name, depths in DEPTHS.items()},
    **{name: Shape(depths, final_norm=True, photographs=True) for name, depths in IMAGENET_DEPTHS.items()},
}

# Largest number of blocks in a section, and of channels of the stem.
MOST = 10_000


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    depths: Sequence[int] = (),
    width: int | None = None,
    final_norm: bool | None = None,
    zero_init: bool = False,
    image_size: int | None = None,
) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: A key of `MODELS`, or `LIBRARY:NAME` (see `resist.models.third_party`).
        num_classes: Number of logits.
        in_channels: Channels of the images.
        depths: Number of blocks in each of the four sections, each at most `MOST`; default: those of the named
            network.
        width: Channels of the stem, at most `MOST`; default: that of the named network.
        final_norm: Apply a norm and a ReLU before the last pooling; default: as the named network. Those for ImageNet
            always do.
        zero_init: The blocks of the long section, after its first, begin as the identity.
        image_size: Height and width of the images in pixels, for networks of other libraries that are built for one
            size.

    Returns:
        A network that maps images (batch, in_channels, height, width) to logits (batch, num_classes).

    Raises:
        UserError: The name is unknown, a value is out of bounds, or an option has no effect with this network.
    """
    if is_third_party(name):
        given = {"depths": depths, "width": width is not None, "final_norm": final_norm is not None}
        for option, is_given in (given | {"zero_init": zero_init}).items():
            if is_given:
                raise UserError(
                    f"{option} has no effect with `model={name}`, whose library defines its shape; remove it"
                )
        return build_third_party(name, num_classes=num_classes, image_size=image_size)
    _check_known(name)
    shape = MODELS[name]
    if depths and (len(depths) != 4 or min(depths) < 1 or max(depths) > MOST):
        text = ",".join(map(str, depths))
        raise UserError(f"`model_args=depths={text}`; give four numbers of blocks, each 1 to {MOST}")
    width = shape.width if width is None else width
    if not 1 <= width <= MOST:
        raise UserError(f"`model_args=width={width}`; must be 1 to {MOST}")
    if num_classes < 1:
        raise UserError(f"`num_classes={num_classes}`; must be at least 1")
    depths = tuple(depths) or shape.depths
    final_norm = shape.final_norm if final_norm is None else final_norm
    if zero_init and depths[2] < 2:
        raise UserError("`model_args=zero_init` has no effect where the third section has one block; remove it")
    if shape.photographs:
        if not final_norm:
            raise UserError(f"final_norm=False is not possible with `model={name}`, which always has it; remove it")
        return PreActResNetImageNet(depths, num_classes, width=width, in_channels=in_channels, zero_init=zero_init)
    return PreActResNet(
        depths, num_classes, width=width, in_channels=in_channels, final_norm=final_norm, zero_init=zero_init
    )


def read_model_args(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Convert texts of the form `KEY=VALUE` to keyword arguments of `build`.

    Args:
        name: Name of the network, which decides the allowed keys.
        texts: For example `("depths=3,4,23,3", "width=8", "final_norm=true")`.

    Raises:
        UserError: The network is unknown, or a key is not an argument of it, is given twice, or has an invalid value.
            `build` checks the bounds.
    """
    if is_third_party(name):
        if texts:
            raise UserError(
                f"`model_args={' '.join(texts)}` has no effect with `model={name}`, whose library defines its shape; "
                "remove it"
            )
        return {}
    _check_known(name)
    readers: dict[str, tuple[Callable[[str], Any], str]] = {
        "depths": (_numbers, "four whole numbers, as in depths=3,4,23,3"),
        "width": (int, "a whole number"),
        "final_norm": (_truth, "true or false"),
        "zero_init": (_truth, "true or false"),
    }
    if MODELS[name].photographs:
        del readers["final_norm"]  # these networks always have it
    arguments: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in readers or key in arguments:
            problem = "is given twice" if key in arguments else f"is not an argument of {name}"
            raise UserError(f"`model_args={text}`: {key!r} {problem}; allowed are {', '.join(readers)}, each once")
        read, form = readers[key]
        try:
            arguments[key] = read(value)
        except ValueError:
            raise UserError(f"`model_args={text}`: {value!r} is not {form}") from None
    return arguments


def _check_known(name: str) -> None:
    if name not in MODELS:
        raise UserError(
            f"`model={name}` is not known; choose one of {', '.join(MODELS)}, or torchvision:NAME, timm:NAME, "
            "transformers:TYPE"
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
