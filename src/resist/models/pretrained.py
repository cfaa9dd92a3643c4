"""Initial weights from timm: files of resnetv2_50, resnetv2_101 or resnetv2_152, named `timm:FILE`.

Our ImageNet networks and timm's resnetv2 have the same weights under different names:

    stem.weight             stem.conv.weight
    layer3.1.conv2.weight   stages.2.blocks.1.conv2.weight
    layer3.0.shortcut...    stages.2.blocks.0.downsample.conv...
    head.weight             head.fc.weight, which belongs to a 1x1 convolution in timm

The translations share tensors instead of copying them, and keep names that have no counterpart.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from resist.errors import UserError, first_line
from resist.models.preact_imagenet import PreActResNetImageNet

HEAD = ("head.weight", "head.bias")


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
    weights = from_timm(read_weights(path))
    # Old files do not count batches.
    weights = {n: t for n, t in current.items() if n.endswith("num_batches_tracked")} | weights
    has_head = all(n in weights and weights[n].shape == current[n].shape for n in HEAD)
    note = f"initial weights from {path}"
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


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read the named tensors of a .safetensors file or a torch.save file.

    No code in the file is executed.

    Raises:
        UserError: The file is missing or damaged, or does not contain named tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'No such file or directory'}; give timm:FILE")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = first_line(error)[:80]
        raise UserError(f"{path}: not a weight file, or damaged ({reason}); give a complete one") from error
    # timm's training script saves the weights within a larger dict.
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path}: contains no dict of named tensors; give the state dict of a resnetv2 of timm")
    return content


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
