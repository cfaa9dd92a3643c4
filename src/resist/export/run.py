"""Export of a finished run: complete BatchNorm statistics, scale folded or kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from resist.blocks.modules import BatchNorm
from resist.data import Images, image_size_of, normalization_of, num_classes_of
from resist.errors import UserError
from resist.export.comparing import difference
from resist.export.files import FORMAT, SUFFIXES, check_target, state_of, write_program, write_state
from resist.export.folding import Fold, fold
from resist.export.onnx import check_installed, write_onnx
from resist.export.recipe import Recipe, check_loads, timm_counterpart
from resist.models import read_model_args
from resist.runs.config import NetworkConfig, TrainConfig
from resist.runs.config_file import read_config
from resist.runs.history import warn_of_rounds
from resist.runs.model_file import EMA_FILE, FILE, load_full
from resist.subnet.batchnorm import recalibrate, use_batch_statistics
from resist.subnet.scaling import records_of, scale_blocks, scales_of
from resist.subnet.seeded import build_seeded
from resist.tasks import network_builder, open_task

# Allowed suffixes of each target's files, the default first.
TARGETS = {
    "safetensors": (".safetensors",),
    "torch": (".pt", ".pth"),
    "torchvision": SUFFIXES,
    "timm": SUFFIXES,
    "program": (".pt2",),
    "onnx": (".onnx",),
}
GRAPHS = ("program", "onnx")  # files that hold what the network computes, not only its weights
SCALES = ("fold", "keep", "approximate")


@dataclass(frozen=True)
class Export:
    """Record of an exported file.

    Attributes:
        path: The file.
        recipe: How to rebuild its network.
        scales: Factor of each block's branch by dotted name; empty where the run scales none.
        folds: The parameters that the scales were folded into; empty where they were kept.
        difference: Largest difference between the outputs of the file's network and the scaled one, on noise, relative
            to the largest logit.
        accuracy: Test accuracy, 0 to 1, of the scaled network and of the file's; None where the fold is exact.
        runtime_difference: For onnx, largest difference between the logits of onnxruntime and torch, relative to the
            largest logit; None where onnxruntime is not installed, and for other targets.
        data: The data set without its images: classes, normalization and image size.
    """

    path: Path
    recipe: Recipe
    scales: Mapping[str, float]
    folds: Sequence[Fold]
    difference: float
    accuracy: tuple[float, float] | None
    runtime_difference: float | None
    data: Images


def export_run(
    run: Path,
    to: str,
    out: Path | None = None,
    *,
    scale: str = "fold",
    ema: bool = False,
    calibrate: bool = False,
    data_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Export:
    """Write a finished run's network to a file usable without this package.

    Args:
        run: Run directory.
        to: Target, a key of `TARGETS`; see `resist.export`.
        out: The file, which must not exist. Default: `default_name(to)` in the run directory.
        scale: One of `SCALES`; see `resist.export`.
        ema: Export the average of the weights (EMA), of a run that has one.
        calibrate: Estimate BatchNorm statistics on training images first.
        data_dir: Directory of the data set, for `calibrate` and `scale="approximate"`; default: that of the run.
        device: Device on which images are run through the network.

    Raises:
        UserError: The run is not finished, the network cannot be exported to this target, or the file exists.
    """
    for name, value, allowed in (("to", to, TARGETS), ("scale", scale, SCALES)):
        if value not in allowed:
            raise UserError(f"`{name}={value!r}` is not one of {', '.join(allowed)}")
    path = out if out is not None else run / default_name(to)
    config = read_config(run)
    warn_of_rounds(run)
    data_dir = data_dir or config.network.data_dir
    config = replace(config, network=replace(config.network, data_dir=data_dir, init_from=None))
    check_target(path, TARGETS[to])
    if ema and config.optimization.model_ema_decay is None:
        raise UserError(f"{run} has no average of its weights, because it has no `model_ema_decay`; remove `ema`")
    if to == "onnx":
        check_installed()
    data = data_description(config.network)
    recipe = recipe_for(to, config.network, data)
    model = scaled_network(run, config, file=EMA_FILE if ema else FILE, calibrate=calibrate, device=device)
    images = example(data)
    scales = scales_of(model)
    folded, folds = model, list[Fold]()
    if scale != "keep":
        folded, folds = fold(model, images, approximate=scale == "approximate")
    accuracy = None
    if any(not record.exact for record in folds):  # measure the accuracy that the fold costs
        task = open_task(config.network, config.optimization).to(device)
        before, after = (next(iter(task.test(network.to(device)).values())) for network in (model, folded))
        accuracy = before, after
        model, folded = model.cpu(), folded.cpu()
    state = state_of(folded)
    if to not in GRAPHS:  # the library has to build a network that computes the same
        recipe = check_loads(recipe, state, folded, images)
    metadata = describe(config, recipe, data, "none" if not scales else "kept" if scale == "keep" else "folded")
    kept = {recipe.block_name(name): value for name, value in records_of(folded).items()}
    metadata["scales"] = json.dumps(kept)  # for the reader to apply
    runtime_difference = None
    if to == "program":
        write_program(path, folded, images, metadata)
    elif to == "onnx":
        runtime_difference = write_onnx(path, folded, images, metadata)
    else:
        write_state(path, recipe.translated(state), metadata)
    error = difference(model, folded, images)
    return Export(path, recipe, scales, folds, error, accuracy, runtime_difference, data)


def default_name(to: str) -> str:
    """Return the file name for a target."""
    return f"exported{f'-{to}' if to in ('timm', 'torchvision') else ''}{TARGETS[to][0]}"


def data_description(config: NetworkConfig) -> Images:
    """Describe a run's data set: classes, normalization and image size.

    The result contains no images, which need not be available.
    """
    size, name = config.image_size or image_size_of(config.data), config.data
    images = torch.empty((0, 3, size, size), dtype=torch.uint8, device="cpu")
    labels = torch.empty(0, dtype=torch.int64, device="cpu")
    return Images(images, labels, num_classes_of(name, config.data_dir), *normalization_of(name), pad=0, flip=False)


def example(data: Images, num: int = 2) -> Tensor:
    """Return fixed noise as images, (num, channels, height, width)."""
    return torch.randn(num, *data.images.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu")


def recipe_for(to: str, config: NetworkConfig, data: Images) -> Recipe:
    """Return the recipe of a run's network.

    Args:
        to: Target, a key of `TARGETS`.
        config: Options of the run's network.
        data: The result of `data_description`.

    Raises:
        UserError: `to` is a library that does not have the network.
    """
    library, _, name = config.model.rpartition(":")
    options: dict[str, object] = {"num_classes": data.num_classes}
    arguments = read_model_args(config.model, config.model_args)
    if library not in ("timm", "torchvision"):
        library, name = "resist", config.model
        options |= arguments
        if ":" in name:  # transformers:TYPE, which resist.models.build builds for an image size
            options["image_size"] = data.images.shape[-1]
    if to == "timm" and library == "resist":
        counterpart = timm_counterpart(name, data.num_classes, arguments.get("depths", ()), arguments.get("width"))
        if counterpart is not None:
            return counterpart
    if to in ("timm", "torchvision") and to != library:
        alternative = f"{library} or " if library != "resist" else ""
        raise UserError(
            f"`to={to}` is for runs of `model={to}:NAME`{' or preact_resnet..._imagenet' if to == 'timm' else ''}, not "
            f"of {config.model}; give `to={alternative}safetensors`, torch, program or onnx"
        )
    return Recipe(library, name, options)


def scaled_network(
    run: Path,
    config: TrainConfig,
    *,
    file: str = FILE,
    calibrate: bool = False,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load the full network of a finished run, with running BatchNorm statistics.

    Args:
        run: Run directory.
        config: Options of the run.
        file: The file of the network in the run directory.
        calibrate: Estimate BatchNorm statistics on training images.
        device: Device on which they are estimated.

    Returns:
        The network in eval mode on the CPU, blocks scaled by hooks.

    Raises:
        UserError: The run is not finished, or its network has no statistics and `calibrate` is off, or `calibrate` has
            no effect with the network.
    """
    without_statistics = config.method.batchnorm == "batch"
    build = network_builder(config.network)
    model = build_seeded(build, config.run.seed)  # seeded for buffers that are not saved, such as position tables
    has_batchnorm = any(isinstance(module, BatchNorm) for module in model.modules())
    if without_statistics and has_batchnorm and not calibrate:
        raise UserError(
            f"{run} was trained with `batchnorm=batch` and has no running statistics, which an ordinary network needs; "
            "give `calibrate` to estimate them on its training images"
        )
    if calibrate and not has_batchnorm:
        raise UserError(f"`calibrate` has no effect with {config.network.model}, which has no BatchNorm; remove it")
    if without_statistics:
        use_batch_statistics(model)
    load_full(model, run / file)
    if without_statistics:
        # Move weights and scales to a network that has statistics, so far those of a fresh network.
        state, scales = model.state_dict(), records_of(model)
        model = build_seeded(build, config.run.seed)
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in missing), missing
        scale_blocks(model, scales)
    if calibrate:
        images = open_task(config.network, config.optimization).to(device).calibration(config.run.seed)
        recalibrate(model.to(device), images, torch.device(device))
    return model.cpu().eval()


def describe(config: TrainConfig, recipe: Recipe, data: Images, scale: str) -> dict[str, str]:
    """Return a file's metadata: text, or JSON for other values.

    Args:
        config: Options of the run.
        recipe: How to rebuild the network.
        data: The result of `data_description`.
        scale: "none", "folded" or "kept".
    """
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
