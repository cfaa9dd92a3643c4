"""Networks of other libraries by name, always with fresh weights: nothing is downloaded.

torchvision:resnet101               torchvision.models.resnet101, and any other classification network of torchvision
timm:vit_small_patch16_224          timm.create_model; needs `pip install resist[timm]`
transformers:vit                    the image classifier of this model type, with the sizes that its configuration has
                                    by default; transformers:my.json takes them from a file; needs
                                    `pip install resist[transformers]`

A network whose size of images is fixed when it is built, as most transformers', is built for those of the data set.
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

from resist.errors import UserError

LIBRARIES = ("torchvision", "timm", "transformers")
# How torchvision's networks of a fixed size are told the size, by the module that they come from.
_TORCHVISION_SIZE: dict[str, Callable[[int], dict[str, object]]] = {
    "vision_transformer": lambda size: {"image_size": size},
    "maxvit": lambda size: {"input_size": (size, size)},
}


def is_foreign(name: str) -> bool:
    return ":" in name


def build_foreign(name: str, *, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network `LIBRARY:NAME` with fresh weights and a head of `num_classes`. Images -> logits (batch, num_classes).

    image_size: height and width of the images, for networks that are built for one size; default: the network's own.
    Raises UserError for an unknown name, a library that is not installed, and what the library refuses.
    """
    library, _, own = name.partition(":")
    builders = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
    if library not in builders:
        raise UserError(f"model={name!r}: {library!r} is not one of {', '.join(LIBRARIES)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of theirs, about weights that are to be trained
        try:
            return builders[library](own, num_classes, image_size)
        except UserError as error:
            raise UserError(f"model={name!r}: {error}") from error
        except (NotImplementedError, torch.OutOfMemoryError):
            raise  # it reads its own weights while it is built, and cannot be built on the meta device
        except Exception as error:  # theirs: whatever stops them from building it for these images
            images = "" if image_size is None else f" for images of {image_size} x {image_size}"
            raise UserError(
                f"model={name!r} cannot be built{images}: {_line(error)}; choose another model, or larger images"
            ) from error


def check_logits(model: nn.Module, name: str, image_size: int, num_classes: int) -> None:
    """Raise UserError where a network does not turn two images of this size into logits. model: on the host."""
    images = torch.zeros(2, 3, image_size, image_size)
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:  # theirs
        raise UserError(
            f"model={name!r} does not take images of {image_size} x {image_size}: {_line(error)}; choose data with "
            "larger images, or another model"
        ) from error
    if not isinstance(logits, Tensor):
        raise UserError(f"model={name!r} returns a {type(logits).__name__}, not logits; choose a classification model")
    if logits.shape != (2, num_classes):
        raise UserError(
            f"model={name!r} returns the shape {tuple(logits.shape)} for two images, not (2, {num_classes}); "
            "choose a classification model"
        )


def _torchvision(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"torchvision has no classification network of that name{_similar(name, known)}")
    module = models.get_model_builder(name).__module__.rpartition(".")[2]
    size = _TORCHVISION_SIZE.get(module) if image_size is not None else None
    options: dict[str, Any] = size(image_size) if size is not None and image_size is not None else {}
    if module in ("googlenet", "inception"):  # else they return further logits while they are trained
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
        of_type = {kind.model_type: kind for kind in classifier._model_mapping}
        if name not in of_type:
            raise UserError(f"transformers has no image classifier of that type{_similar(name, list(of_type))}")
        config = of_type[name](num_labels=num_classes)
    if image_size is not None and hasattr(config, "image_size"):
        config.image_size = image_size
    model = classifier.from_config(config)
    model.register_forward_hook(TakeLogits())
    return model


class TakeLogits:
    """Forward hook that takes the logits out of the record that a network of transformers returns. A hook rather than a
    module around it, so that every tensor keeps the name that its library gives it."""

    def __call__(self, module: nn.Module, args: object, output: Any) -> Tensor:
        if not isinstance(getattr(output, "logits", None), Tensor):
            raise UserError(f"a {type(module).__name__} returns no logits; choose an image classifier")
        return output.logits


def _library(name: str) -> Any:
    try:
        found = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed; pip install 'resist[{name}]', or pip install {name}") from error
    logging.getLogger(name).setLevel(logging.ERROR)  # it speaks of weights that we do not load
    return found


def _similar(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; it has {', '.join(known[:4])} and others"


def _line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
