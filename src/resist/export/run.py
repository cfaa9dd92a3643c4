"""The network of a finished run as it leaves the house: its statistics complete, its scale folded or kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from resist.data import Images, image_size_of, normalization_of, num_classes_of
from resist.errors import UserError
from resist.export.files import FORMAT, SUFFIXES, check_target, state_of, write_program, write_state
from resist.export.folding import Fold, difference, fold
from resist.export.recipe import Recipe, check_loads, timm_counterpart
from resist.runs.config import NetworkConfig, TrainConfig
from resist.runs.history import read_config
from resist.runs.model_file import FILE, load_full
from resist.subnet.batchnorm import recalibrate, use_batch_statistics
from resist.subnet.chains import choose_chains
from resist.subnet.scaling import scale_blocks, scales_of
from resist.subnet.seeded import build_seeded
from resist.tasks import network_builder, open_task

# What each target's files may be called, the default first.
TARGETS = {
    "safetensors": (".safetensors",),
    "torch": (".pt", ".pth"),
    "torchvision": SUFFIXES,
    "timm": SUFFIXES,
    "program": (".pt2",),
}
SCALES = ("fold", "keep", "approximate")


@dataclass(frozen=True)
class Export:
    """What was written.

    scales:     the scale of each block's branch by its dotted name; empty where the run scales none.
    folds:      where they went, when they were folded.
    difference: largest difference of the file's network to the scaled one, on noise, relative to the largest logit.
    accuracy:   test accuracy, 0 to 1, of the scaled network and of the file's, where the two differ.
    data:       the data set, without its images: classes, normalization and image size.
    """

    path: Path
    recipe: Recipe
    scales: Mapping[str, float]
    folds: Sequence[Fold]
    difference: float
    accuracy: tuple[float, float] | None
    data: Images


def export_run(
    run: Path,
    to: str,
    out: Path | None = None,
    *,
    scale: str = "fold",
    calibrate: bool = False,
    data_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Export:
    """Write the network of a finished run for others; `resist.export` tells what `to` and `scale` may be.

    out:       the file, which must not exist. Default: `default_name(to)` in the run directory.
    calibrate: estimate BatchNorm statistics on training images first. data_dir, device: where those lie, and where the
               network runs on them.

    Raises UserError in one line for what cannot be exported.
    """
    for name, value, allowed in (("to", to, TARGETS), ("scale", scale, SCALES)):
        if value not in allowed:
            raise UserError(f"--{name} {value!r} is not one of {', '.join(allowed)}")
    path = out if out is not None else run / default_name(to)
    config = read_config(run)
    here = data_dir or config.network.data_dir
    config = replace(config, network=replace(config.network, data_dir=here, pretrained=None))
    check_target(path, TARGETS[to])
    data = data_facts(config.network)
    recipe = recipe_for(to, config.network, data)
    model = scaled_network(run, config, calibrate=calibrate, device=device)
    images = example(data)
    scales = scales_of(model)
    folded, folds = model, list[Fold]()
    if scale != "keep":
        folded, folds = fold(model, images, approximate=scale == "approximate")
    accuracy = None
    if any(not one.exact for one in folds):
        task = open_task(config.network).to(device)
        before, after = (next(iter(task.test(one.to(device)).values())) for one in (model, folded))
        accuracy = before, after
        model, folded = model.cpu(), folded.cpu()
    state = state_of(folded)
    if to != "program":
        recipe = check_loads(recipe, state, folded, images)
    metadata = describe(config, recipe, data, "none" if not scales else "kept" if scale == "keep" else "folded")
    left = {recipe.block_name(name): value for name, value in scales_of(folded).items()}
    metadata["scales"] = json.dumps(left)  # those that a reader has yet to apply
    if to == "program":
        write_program(path, folded, images, metadata)
    else:
        write_state(path, recipe.translated(state), metadata)
    return Export(path, recipe, scales, folds, difference(model, folded, images), accuracy, data)


def default_name(to: str) -> str:
    return f"exported{f'-{to}' if to in ('timm', 'torchvision') else ''}{TARGETS[to][0]}"


def data_facts(config: NetworkConfig) -> Images:
    """The data set of a run without its images, which need not be at hand."""
    size, name = config.image_size or image_size_of(config.data), config.data
    none = torch.empty((0, 3, size, size), dtype=torch.uint8)
    labels = torch.empty(0, dtype=torch.int64)
    return Images(none, labels, num_classes_of(name, config.data_dir), *normalization_of(name), pad=0, flip=False)


def example(data: Images, num: int = 2) -> Tensor:
    """Noise in place of normalized images, always the same. (num, channels, height, width)"""
    return torch.randn(num, *data.images.shape[1:], generator=torch.Generator().manual_seed(0))


def recipe_for(to: str, config: NetworkConfig, data: Images) -> Recipe:
    """What builds the network of a run. Raises UserError where that is not in the library `to` that was asked for."""
    library, _, name = config.model.rpartition(":")
    options: dict[str, object] = {"num_classes": data.num_classes}
    if library not in ("timm", "torchvision"):
        library, name = "resist", config.model
        given = {"sections": config.sections, "width": config.width, "final_norm": config.final_norm}
        options |= {key: value for key, value in given.items() if value}
        if ":" in name:  # of a library that has no function to build it by name
            options["image_size"] = data.images.shape[-1]
    if to == "timm" and library == "resist":
        counterpart = timm_counterpart(name, data.num_classes, config.sections, config.width)
        if counterpart is not None:
            return counterpart
    if to in ("timm", "torchvision") and to != library:
        fits = f"{library} or " if library != "resist" else ""
        raise UserError(
            f"--to {to} takes runs of --model {to}:NAME{' or preact_resnet..._imagenet' if to == 'timm' else ''}, and "
            f"this one is of {config.model}; "
            f"give --to {fits}safetensors, torch or program"
        )
    return Recipe(library, name, options)


def scaled_network(
    run: Path, config: TrainConfig, *, calibrate: bool = False, device: torch.device | str = "cpu"
) -> nn.Module:
    """The full network of a finished run in eval mode, blocks scaled by hooks, with running BatchNorm statistics."""
    without = config.method.batchnorm == "batch"
    build = network_builder(config.network)
    model = build_seeded(build, config.run.seed)  # with buffers that are not saved, such as tables of positions
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if without and normed and not calibrate:
        raise UserError(
            f"{run} was trained with --batchnorm batch and has no running statistics, which an ordinary network needs; "
            "give --calibrate to estimate them on its training images"
        )
    if calibrate and not normed:
        raise UserError(f"--calibrate says nothing to {config.network.model}, which has no BatchNorm; leave it out")
    if without:
        use_batch_statistics(model)
    load_full(model, choose_chains(model, config.network.chain), run / FILE)
    if without:
        state, scales = model.state_dict(), scales_of(model)
        model = build_seeded(build, config.run.seed)  # with statistics, which are still those of a fresh network
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in missing), missing
        scale_blocks(model, scales)
    if calibrate:
        images = open_task(config.network).to(device).calibration(config.run.seed)
        recalibrate(model.to(device), images, torch.device(device))
    return model.cpu().eval()


def describe(config: TrainConfig, recipe: Recipe, data: Images, scale: str) -> dict[str, str]:
    """The metadata of a file: text, or JSON where it is not text."""
    import resist

    return {
        "format": FORMAT,
        "resist": resist.__version__,
        "model": recipe.name,
        "create": f"{recipe.imports}; {recipe.code}",
        "scale": scale,
        "num_classes": str(data.num_classes),
        "data": config.network.data,
        "input_size": json.dumps(list(data.images.shape[1:])),
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
    }
