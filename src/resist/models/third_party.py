"""Networks of other libraries by name, with fresh weights, never downloaded.

- `torchvision:resnet101`: `torchvision.models.resnet101`, or any other classification network of torchvision.
- `timm:vit_small_patch16_224`: `timm.create_model`; needs `pip install torch-resist[timm]`.
- `transformers:vit`: the image classifier of this model type, in the default size of its configuration.
  `transformers:my.json` reads the configuration from a file. Needs `pip install torch-resist[transformers]`.

Networks that are built for one image size, like most vision transformers, are built for that of the data set.
"""

import difflib
import importlib
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resist.errors import UserError, first_line

# The argument that sets the image size of torchvision's networks, by the module that defines them.
_TORCHVISION_SIZE: dict[str, Callable[[int], dict[str, object]]] = {
    "vision_transformer": lambda size: {"image_size": size},
    "maxvit": lambda size: {"input_size": (size, size)},
}


def is_third_party(name: str) -> bool:
    """Return True for names of the form `LIBRARY:NAME`."""
    return ":" in name


def build_third_party(name: str, *, num_classes: int, image_size: int | None = None) -> nn.Module:
    """Build a network of another library with fresh weights.

    Args:
        name: `LIBRARY:NAME`, see the module docstring.
        num_classes: Number of logits.
        image_size: Height and width of the images in pixels, for networks that are built for one size; default: the
            size that the library chooses.

    Returns:
        A network that maps images (batch, 3, height, width) to logits (batch, num_classes).

    Raises:
        UserError: The name is unknown, the library is not installed, or it cannot build the network.
    """
    library, _, library_name = name.partition(":")
    builders = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
    if library not in builders:
        raise UserError(f"`model={name!r}`: {library!r} is not one of {', '.join(builders)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries warn that the weights are not trained yet
        try:
            return builders[library](library_name, num_classes, image_size)
        except UserError as error:
            raise UserError(f"`model={name!r}`: {error}") from error
        except (NotImplementedError, torch.OutOfMemoryError):
            raise  # the constructor reads its weights, so that the network cannot be built on the meta device
        except Exception as error:  # the library's own: anything may prevent a network for these images
            images = "" if image_size is None else f" for images of {image_size} x {image_size}"
            raise UserError(
                f"`model={name!r}` cannot be built{images}: {first_line(error)}; choose another model, or larger images"
            ) from error


def check_logits(model: nn.Module, name: str, image_size: int, num_classes: int) -> None:
    """Check that a network maps two images of this size to logits.

    Args:
        model: The network, on the CPU. It is put into eval mode.
        name: Its name, for messages.
        image_size: Height and width of the images in pixels.
        num_classes: The expected number of logits.

    Raises:
        UserError: The forward pass fails, or does not return a tensor (2, num_classes).
    """
    images = torch.zeros(2, 3, image_size, image_size, device="cpu")
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:  # any error of the network's own code
        raise UserError(
            f"`model={name!r}` does not accept images of {image_size} x {image_size}: {first_line(error)}; choose data "
            "with larger images, or another model"
        ) from error
    if not isinstance(logits, Tensor):
        raise UserError(
            f"`model={name!r}` returns a {type(logits).__name__}, not logits; choose a classification model"
        )
    if logits.shape != (2, num_classes):
        raise UserError(
            f"`model={name!r}` returns the shape {tuple(logits.shape)} for two images, not (2, {num_classes}); "
            "choose a classification model"
        )


def _torchvision(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classification network of that name{_similar(name, known)}")
    module = models.get_model_builder(name).__module__.rpartition(".")[2]
    size = _TORCHVISION_SIZE.get(module)
    options: dict[str, Any] = size(image_size) if size is not None and image_size is not None else {}
    if module in ("googlenet", "inception"):  # otherwise they return auxiliary logits in training
        options |= {"aux_logits": False, "init_weights": False}
    return models.get_model(name, weights=None, num_classes=num_classes, **options)


def _timm(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    timm = _library("timm")
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise UserError(f"timm has no network of that name{_similar(plain, timm.list_models())}")
    config = timm.get_pretrained_cfg(plain)
    options: dict[str, Any] = {}
    if image_size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)


def _transformers(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    transformers = _library("transformers")
    classifier = transformers.AutoModelForImageClassification
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise UserError("there is no such file; give a model type (vit), or a configuration file of transformers")
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        config.num_labels = num_classes
    else:
        config_classes = {config_class.model_type: config_class for config_class in classifier._model_mapping}
        if name not in config_classes:
            raise UserError(f"transformers has no image classifier of that type{_similar(name, list(config_classes))}")
        config = config_classes[name](num_labels=num_classes)
    if image_size is not None and hasattr(config, "image_size"):
        config.image_size = image_size
    model = classifier.from_config(config)
    model.register_forward_hook(TakeLogits())
    return model


class TakeLogits:
    """Forward hook that returns only the logits of a transformers model output.

    A hook and not a wrapping module, so that every tensor keeps the name that the library gives it.
    """

    def __call__(self, module: nn.Module, args: object, output: Any) -> Tensor:
        if not isinstance(getattr(output, "logits", None), Tensor):
            raise UserError(f"a {type(module).__name__} returns no logits; choose an image classifier")
        return output.logits


def _library(name: str) -> Any:
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} is not installed; pip install 'torch-resist[{name}]', or pip install {name}"
        ) from error
    logging.getLogger(name).setLevel(logging.ERROR)  # it logs about weights that we do not load
    return library


def _similar(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.7)
    return f"; did you mean {', '.join(close)}?" if close else f"; it has {', '.join(known[:4])} and others"
