"""Weights of another program to begin with: `timm:FILE`, a file of timm's resnetv2_50, resnetv2_101 or resnetv2_152.

Our ImageNet networks and timm's resnetv2 have the same weights under different names:

    stem.weight             stem.conv.weight
    layer3.1.conv2.weight   stages.2.blocks.1.conv2.weight
    layer3.0.shortcut...    stages.2.blocks.0.downsample.conv...
    head.weight             head.fc.weight, there that of a 1x1 convolution

Tensors are shared, not copied. Names that the other side does not have are left as they are."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from resist.errors import UserError
from resist.models.preact_imagenet import PreActResNetImageNet

HEAD = ("head.weight", "head.bias")


def start_from(model: nn.Module, source: str) -> str:
    """Fill `model` with the weights that `source` names; on the meta device only see whether they fit. Returns a line
    that says what was taken: the head stays as it is where the file has another number of classes.

    Raises UserError in one line where there is no such file, or it holds another network.
    """
    kind, _, name = source.partition(":")
    if kind != "timm" or not name:
        raise UserError(f"--pretrained {source!r} does not read timm:FILE; give the weight file of a resnetv2 of timm")
    if not isinstance(model, PreActResNetImageNet):
        raise UserError(
            f"--pretrained {source} says nothing to this network; give --model preact_resnet50_imagenet, "
            "preact_resnet101_imagenet or preact_resnet152_imagenet, or leave it out"
        )
    path, own = Path(name), model.state_dict()
    found = from_timm(read_weights(path))
    # Old files do not count batches.
    found = {n: t for n, t in own.items() if n.endswith("num_batches_tracked")} | found
    head = all(n in found and found[n].shape == own[n].shape for n in HEAD)
    line = f"begins with the weights in {path}"
    if not head and HEAD[1] in found:
        line += f", but for the head: {len(found[HEAD[1]])} classes there, {len(own[HEAD[1]])} here"
    elif not head:
        line += ", which have no head"
    if not head:
        found |= {n: own[n] for n in HEAD}
    for n in [*own, *found]:
        there = tuple(found[n].shape) if n in found else "nothing"
        here = tuple(own[n].shape) if n in own else "nothing"
        if there != here:
            raise UserError(
                f"{path}: holds another network than --model: {timm_name(n)} is {there} there and {here} here"
            )
    if not any(tensor.is_meta for tensor in own.values()):
        model.load_state_dict(found)
    return line


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The named tensors in a .safetensors file or in one that torch.save wrote, which is read without running it."""
    if not path.is_file():
        raise UserError(f"{path}: {'is no file' if path.exists() else 'No such file or directory'}; give timm:FILE")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"{path}: is no file of weights ({reason}); give a whole one") from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):  # as timm's training script saves
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path}: holds no table of named tensors; give the state dict of a resnetv2 of timm")
    return found


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `state_dict` of a `PreActResNetImageNet` as timm's network of the same sections takes it."""
    return {
        timm_name(name): tensor[:, :, None, None] if name == "head.weight" else tensor for name, tensor in state.items()
    }


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `state_dict` of one of timm's resnetv2 as a `PreActResNetImageNet` takes it."""
    return {our_name(name): tensor.flatten(1) if name == "head.fc.weight" else tensor for name, tensor in state.items()}


def timm_name(ours: str) -> str:
    name = re.sub(r"^layer(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.", ours)
    name = name.replace(".shortcut.", ".downsample.conv.")
    return re.sub(r"^(stem|head)\.", lambda found: {"stem": "stem.conv.", "head": "head.fc."}[found[1]], name)


def our_name(timms: str) -> str:
    name = re.sub(r"^stages\.(\d+)\.blocks\.", lambda found: f"layer{int(found[1]) + 1}.", timms)
    name = name.replace(".downsample.conv.", ".shortcut.")
    return re.sub(r"^(stem\.conv|head\.fc)\.", lambda found: f"{found[1][:4]}.", name)
