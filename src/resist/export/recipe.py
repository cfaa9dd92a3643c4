"""Whose network it is: what builds the same one outside of a run, and what says so to a reader."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.export.folding import TOLERANCE, difference
from resist.models.preact_imagenet import IMAGENET_DEPTHS
from resist.models.pretrained import timm_name, to_timm
from resist.subnet.scaling import scale_blocks, scales_of

LIBRARIES = {  # the function of each that builds a network by name
    "resist": ("resist.models", "build", "from resist.models import build"),
    "timm": ("timm", "create_model", "import timm"),
    "torchvision": ("torchvision.models", "get_model", "import torchvision"),
}
# How networks that are built for one size of images are told the size.
SIZES: dict[str, dict[str, Callable[[int], object]]] = {
    "timm": {"img_size": lambda size: size},
    "torchvision": {"image_size": lambda size: size, "input_size": lambda size: (size, size)},
}


@dataclass(frozen=True)
class Recipe:
    """library: resist, timm or torchvision. name: the network's name there. options: further arguments.
    ours: whether it is a network of ours, which timm has too under other names of its weights."""

    library: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = False

    def translated(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The run's state dict under the names that this network gives its weights."""
        return to_timm(state) if self.ours else state

    def block_name(self, name: str) -> str:
        """The run's dotted name of a block as this network calls it."""
        return timm_name(f"{name}.").removesuffix(".") if self.ours else name

    def build(self) -> nn.Module:
        """The network with fresh weights. Raises UserError where the library is missing or has no such network."""
        module, function, _ = LIBRARIES[self.library]
        try:
            found = getattr(import_module(module), function)
        except ImportError as error:
            raise UserError(f"{self.library} is not installed; pip install {self.library}") from error
        try:
            with torch.random.fork_rng(devices=[]):
                return found(self.name, **self.options)
        except UserError:
            raise
        except Exception as error:  # whatever the library raises
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"{self.library} cannot build {self.name!r}: {reason}") from error

    @property
    def code(self) -> str:
        """Python that builds it."""
        given = "".join(f", {name}={value!r}" for name, value in self.options.items())
        if self.library == "torchvision":
            return f"torchvision.models.{self.name}({given.removeprefix(', ')})"
        return f"{'timm.create_model' if self.library == 'timm' else 'build'}({self.name!r}{given})"

    @property
    def imports(self) -> str:
        return LIBRARIES[self.library][2]


def timm_counterpart(model: str, num_classes: int, sections: Sequence[int], width: int | None) -> Recipe | None:
    """timm's name for one of our networks for photographs, None where it has none."""
    if model not in IMAGENET_DEPTHS:
        return None
    options: dict[str, object] = {"num_classes": num_classes}
    depth = model.removeprefix("preact_resnet").removesuffix("_imagenet")
    if sections or depth == "200":  # timm has no name for these sections
        options["layers"], depth = tuple(sections) or IMAGENET_DEPTHS[model], "50"
    if width is not None:
        options |= {"channels": tuple(factor * width for factor in (4, 8, 16, 32)), "stem_chs": width}
    return Recipe("timm", f"resnetv2_{depth}", options, ours=True)


def check_loads(recipe: Recipe, state: Mapping[str, Tensor], expected: nn.Module, images: Tensor) -> Recipe:
    """The recipe whose network takes `state` and then computes what `expected` does, its scale applied where that was
    kept: `recipe`, or the same for this image size where the size is in the weights, as in a transformer's positions.

    Raises UserError where none does.
    """
    reasons: list[str] = []
    sizes = [{name: of(images.shape[-1])} for name, of in SIZES.get(recipe.library, {}).items()]
    for more in ({}, *sizes):
        one = replace(recipe, options={**recipe.options, **more})
        try:
            theirs = one.build()
            theirs.load_state_dict(one.translated(state))
            scales = {one.block_name(name): scale for name, scale in scales_of(expected).items()}
            far = difference(expected, scale_blocks(theirs, scales), images)
        except (UserError, RuntimeError, AssertionError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reasons.append((lines[1:] or lines or [type(error).__name__])[0])
            continue
        if not far <= TOLERANCE:
            raise UserError(
                f"{one.code} computes something else with the weights of this run (off by {far:.1e} of the largest "
                "logit); give --to program"
            )
        return one
    raise UserError(f"{recipe.code} does not take the weights of this run ({reasons[0]}); give --to program")
