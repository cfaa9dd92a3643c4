"""Initial weights from timm: files of resnetv2_50, resnetv2_101 or resnetv2_152, named `timm:FILE`.

Our ImageNet networks and timm's resnetv2 have the same weights under different names:

    stem.weight             stem.conv.weight
    layer3.1.conv2.weight   stages.2.blocks.1.conv2.weight
    layer3.0.shortcut...    stages.2.blocks.0.downsample.conv...
    head.weight             head.fc.weight, which belongs to a 1x1 convolution in timm

The translations share tensors instead of copying them, and keep names that have no counterpart.
"""

import argparse
import pickle
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn

from resist.errors import UserError, first_line
from resist.models.preact_imagenet import PreActResNetImageNet

HEAD = ("head.weight", "head.bias")
STEM = "stem.conv.weight"
# Classes in the checkpoints of training scripts that run no code: options, and numbers of numpy, as scores often are.
_SCALAR = np.float64(0).__reduce__()[0]
SAFE: list[Any] = [
    argparse.Namespace,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # its name until numpy 2
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in np.sctypeDict.values() if np.dtype(kind).kind in "biufcSU"},
]
# Entries of a checkpoint, those that come first in front: timm too takes averages of the weights before the weights.
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
NO_WEIGHTS = ("optimizer", "optimizer_states", "lr_scheduler", "amp_scaler", "args")
WRAPPERS = r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."


def start_from(model: nn.Module, source: str) -> str:
    """Fill a network with the weights of a file.

    On the meta device, only names and shapes are checked.

    The head of `model` keeps its weights where the file has another number of classes, or no head.

    Args:
        model: A `PreActResNetImageNet` on the CPU or on the meta device.
        source: `timm:FILE`.

    Returns:
        A line for the user: which weights were taken.

    Raises:
        UserError: The file is missing or damaged, or does not fit the network.
    """
    library, _, file_name = source.partition(":")
    if library != "timm" or not file_name:
        raise UserError(
            f"`init_from={source!r}` is not of the form timm:FILE; give the weight file of a resnetv2 of timm "
            "(the directory of a run is for detection)"
        )
    if not isinstance(model, PreActResNetImageNet):
        raise UserError(
            f"`init_from={source}` has no effect with this network; give `model=preact_resnet50_imagenet`, "
            "preact_resnet101_imagenet or preact_resnet152_imagenet, or remove it"
        )
    path, current = Path(file_name), model.state_dict()
    state, entry = read_weights(path)
    weights = from_timm(state)
    # Old files do not count batches.
    weights = {n: t for n, t in current.items() if n.endswith("num_batches_tracked")} | weights
    has_head = all(n in weights and weights[n].shape == current[n].shape for n in HEAD)
    note = f"initial weights from {path}" + (f" ({entry})" if entry else "")
    if not has_head and HEAD[1] in weights:
        note += f", except the head ({len(weights[HEAD[1]])} classes in the file, {len(current[HEAD[1]])} in this run)"
    elif not has_head:
        note += ", which have no head"
    if not has_head:
        weights |= {n: current[n] for n in HEAD}
    for n in [*current, *weights]:
        in_file, in_network = (tuple(tensors[n].shape) if n in tensors else None for tensors in (weights, current))
        if in_file != in_network:
            reason = f"has the shape {in_file} in the file and {in_network} in the network"
            if in_file is None or in_network is None:
                reason = f"is not in the {'file' if in_file is None else 'network'}"
            raise UserError(
                f"{path}: does not fit the network: {timm_name(n)} {reason}; give the options of that network"
            )
    if not any(tensor.is_meta for tensor in current.values()):
        model.load_state_dict(weights)
    return note


def read_weights(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """Read the named tensors of a .safetensors file or a torch.save file, also of a checkpoint of timm's training.

    No code in the file is executed: beyond tensors and plain values, it may contain the classes of `SAFE` alone.

    Returns:
        The tensors under timm's names, and the entry of the checkpoint that they come from; "" where it is none.

    Raises:
        UserError: The file is missing or damaged, or does not contain named tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'No such file or directory'}; give timm:FILE")
    content = _content(path)
    found = dict(_state_dicts(content))

    def order(name: str) -> tuple[bool, int, str]:
        is_network = any(tensor.endswith(STEM) for tensor in found[name])
        return not is_network, ENTRIES.index(name) if name in ENTRIES else len(ENTRIES), name

    names = sorted(found, key=order)
    if not names:
        raise UserError(f"{path}: contains no dict of named tensors; give the state dict of a resnetv2 of timm")
    return _plain(found[names[0]]), names[0]


def _content(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{" and head[:2] != b"PK":  # the length of the header, then the header
            return load_file(path) if str(path).isprintable() else load(path.read_bytes())  # it opens UTF-8 names
        with path.open("rb") as file, torch.serialization.safe_globals(SAFE):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if unknown := _unknown_classes(path, error):
            raise UserError(
                f"{path}: contains {unknown}, not loaded because such objects can run code; save the state dict alone: "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        raise _damaged(path, error) from error
    # torch raises whatever a damaged pickle leads to.
    except Exception as error:
        if "TorchScript" in str(error) or "legacy .tar" in str(error):
            form = "a TorchScript archive" if "TorchScript" in str(error) else "a file of an old version of torch"
            raise UserError(f"{path}: {form}, which is not loaded; save its state dict with torch.save") from error
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    cause = re.search(r"WeightsUnpickler error: (.*)", str(error))  # at the end of a page of advice
    reason = textwrap.shorten(cause[1] if cause else first_line(error), 80, placeholder=" ...")
    return UserError(f"{path}: not a weight file, or damaged ({reason}); give a complete one")


def _unknown_classes(path: Path, error: Exception) -> str:
    """The classes in a file that may not be loaded, for a message; "" where that is not what is wrong."""
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(SAFE):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # it is made for undamaged files of the newer format
        names = []
    named = re.search(r"GLOBAL (\S+)", str(error))
    names = names or ([named[1]] if named else [])
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _state_dicts(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The dicts of named tensors in a checkpoint, by the dotted name of their entry."""
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(key, str) for key in content) and all(isinstance(value, Tensor) for value in content.values()):
        yield name, content
    elif depth < 3:
        for key, value in content.items():
            if isinstance(key, str) and key not in NO_WEIGHTS:
                yield from _state_dicts(value, f"{name}.{key}" if name else key, depth + 1)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers put before or into the names: DDP, compile, an average, a module of Lightning."""
    state = {name: tensor for name, tensor in state.items() if name != "n_averaged"}
    bare = [re.sub(WRAPPERS, "", name) for name in state]
    prefix = next((name.removesuffix(STEM) for name in bare if name.endswith(f".{STEM}")), "")
    plain = {name.removeprefix(prefix): tensor for name, tensor in zip(bare, state.values(), strict=True)}
    return plain if len(plain) == len(state) else state  # two with the same name are two networks


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the `state_dict` of a `PreActResNetImageNet` for timm's network."""
    return {
        timm_name(name): tensor[:, :, None, None] if name == "head.weight" else tensor for name, tensor in state.items()
    }


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the `state_dict` of a resnetv2 of timm for a `PreActResNetImageNet`."""
    return {our_name(name): tensor.flatten(1) if name == "head.fc.weight" else tensor for name, tensor in state.items()}


def timm_name(name: str) -> str:
    """Translate a tensor's name of `PreActResNetImageNet` to timm's."""
    name = re.sub(r"^layer(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.", name)
    name = name.replace(".shortcut.", ".downsample.conv.")
    return re.sub(r"^(stem|head)\.", lambda match: {"stem": "stem.conv.", "head": "head.fc."}[match[1]], name)


def our_name(name: str) -> str:
    """Translate a tensor's name of timm's resnetv2 to that of `PreActResNetImageNet`."""
    name = re.sub(r"^stages\.(\d+)\.blocks\.", lambda match: f"layer{int(match[1]) + 1}.", name)
    name = name.replace(".downsample.conv.", ".shortcut.")
    return re.sub(r"^(stem\.conv|head\.fc)\.", lambda match: f"{match[1][:4]}.", name)
