"""Recipe: how to rebuild the exported network with its own library."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from resist.blocks.modules import fork_rng
from resist.errors import UserError, first_line
from resist.export.comparing import difference
from resist.export.folding import TOLERANCE
from resist.models.preact_imagenet import IMAGENET_DEPTHS
from resist.models.pretrained import timm_name, to_timm
from resist.subnet.scaling import records_of, scale_blocks

# Library -> module and function that build a network by name, and the import statement for users.
LIBRARIES = {
    "resist": ("resist.models", "build", "from resist.models import build"),
    "timm": ("timm", "create_model", "import timm"),
    "torchvision": ("torchvision.models", "get_model", "import torchvision"),
}
# Arguments that set the image size of networks that are built for one size.
SIZES: dict[str, dict[str, Callable[[int], object]]] = {
    "timm": {"img_size": lambda size: size},
    "torchvision": {"image_size": lambda size: size, "input_size": lambda size: (size, size)},
}


@dataclass(frozen=True)
class Recipe:
    """A call that builds a network.

    Attributes:
        library: "resist", "timm" or "torchvision".
        name: Name of the network in that library.
        options: Further arguments of the call.
        ours: True for timm's counterpart of a network of `resist.models`, whose weights have other names in timm.
    """

    library: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = False

    def translated(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rename the tensors of the run's state dict for this network."""
        return to_timm(state) if self.ours else state

    def block_name(self, name: str) -> str:
        """Translate the run's dotted name of a block to this network's."""
        return timm_name(f"{name}.").removesuffix(".") if self.ours else name

    def build(self) -> nn.Module:
        """Build the network with fresh weights; torch's random state is unchanged.

        Raises:
            UserError: The library is not installed, or cannot build the network.
        """
        module, function, _ = LIBRARIES[self.library]
        try:
            builder = getattr(import_module(module), function)
        except ImportError as error:
            raise UserError(f"{self.library} is not installed; pip install {self.library}") from error
        try:
            with fork_rng():
                return builder(self.name, **self.options)
        except UserError:
            raise
        except Exception as error:  # any error of the library
            raise UserError(f"{self.library} cannot build {self.name!r}: {first_line(error)}") from error

    @property
    def code(self) -> str:
        """Python expression that builds the network."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        if self.library == "torchvision":
            return f"torchvision.models.{self.name}({options.removeprefix(', ')})"
        return f"{'timm.create_model' if self.library == 'timm' else 'build'}({self.name!r}{options})"

    @property
    def imports(self) -> str:
        """Import statement that `code` needs."""
        return LIBRARIES[self.library][2]


def timm_counterpart(model: str, num_classes: int, depths: Sequence[int], width: int | None) -> Recipe | None:
    """Return the recipe of timm's counterpart of an ImageNet network of `resist.models`.

    Args:
        model: Name of the network, a key of `IMAGENET_DEPTHS`; for other names there is no counterpart.
        num_classes: Number of logits.
        depths: Number of blocks in each section; empty: those of the named network.
        width: Channels of the stem; None: those of the named network.

    Returns:
        The recipe, or None if timm has no counterpart.
    """
    if model not in IMAGENET_DEPTHS:
        return None
    options: dict[str, object] = {"num_classes": num_classes}
    depth = model.removeprefix("preact_resnet").removesuffix("_imagenet")
    if depths or depth == "200":  # timm has no name for these depths, but an argument
        options["layers"], depth = tuple(depths) or IMAGENET_DEPTHS[model], "50"
    if width is not None:
        options |= {"channels": tuple(factor * width for factor in (4, 8, 16, 32)), "stem_chs": width}
    return Recipe("timm", f"resnetv2_{depth}", options, ours=True)


def check_loads(recipe: Recipe, state: Mapping[str, Tensor], expected: nn.Module, images: Tensor) -> Recipe:
    """Rebuild a network, load weights, and compare its outputs.

    Where the image size is part of the weights, as in position embeddings, the recipe is also tried with an argument
    for this size.

    Args:
        recipe: The call that builds the network.
        state: State dict to load, with the run's names.
        expected: The run's network. Scales that are applied to it by hooks are applied to the built one too.
        images: Input (batch, channels, height, width) for the comparison.

    Returns:
        The recipe that works: `recipe`, or `recipe` with the image size.

    Raises:
        UserError: The network does not load the weights, or does not compute the same with them.
    """
    reasons: list[str] = []
    sizes = [{name: argument(images.shape[-1])} for name, argument in SIZES.get(recipe.library, {}).items()]
    for size in ({}, *sizes):
        sized = replace(recipe, options={**recipe.options, **size})
        try:
            rebuilt = sized.build()
            rebuilt.load_state_dict(sized.translated(state))
            scales = {sized.block_name(name): scale for name, scale in records_of(expected).items()}
            error = difference(expected, scale_blocks(rebuilt, scales), images)
        except (UserError, RuntimeError, AssertionError) as failure:
            # The first line of a failed load_state_dict names only the class; the second one names the tensors.
            lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
            reasons.append((lines[1:] or lines or [type(failure).__name__])[0])
            continue
        if not error <= TOLERANCE:
            raise UserError(
                f"{sized.code} does not compute the same as the network of this run (error {error:.1e} of the largest "
                "logit); give `to=program`"
            )
        return sized
    raise UserError(f"{recipe.code} does not take the weights of this run ({reasons[0]}); give `to=program`")
