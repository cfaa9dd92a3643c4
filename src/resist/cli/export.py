"""`resist export`: write the network of a run for use without this package."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from resist.runs.lock import RunLock

if TYPE_CHECKING:
    from resist.export import Export


@dataclass(frozen=True)
class ExportConfig:
    """Write the network of a run as a file for use elsewhere."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    to: Literal["program", "onnx", "safetensors", "torch", "torchvision", "timm"]
    """program: a torch.export program, which needs torch alone. onnx: a graph for onnxruntime and other runtimes.
    The others are weights, which need the network's source: safetensors: with metadata. torch: a plain state dict; both
    for the library that the network is from, for preact networks this package. torchvision, timm: a state dict for
    their own networks."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write, which must not exist yet. Default: exported.pt2 (.onnx, .safetensors, .pt;
    exported-timm.safetensors) in the run directory."""
    scale: Literal["fold", "keep", "approximate"] = "fold"
    """Factor of each chain block's branch. fold: multiplied into the weights, exactly. keep: stored in the metadata, to
    be applied after loading. approximate: folded even if an activation follows the block's sum; prints both accuracies.
    """
    ema: bool = False
    """Export the average of the weights (EMA) of a run with --model-ema-decay."""
    calibrate: bool = False
    """Estimate BatchNorm statistics on training images first. Required for runs with --batchnorm batch."""
    data_dir: Path | None = None
    """Directory of the data set, for --calibrate and --scale approximate. Default: as in training."""
    device: str = "auto"
    """Device for --calibrate and --scale approximate: cpu, cuda, or auto."""


def run_export(config: ExportConfig, given: frozenset[str]) -> int:
    """Export the network of a run and print how to load it. Returns the exit status."""
    from resist.export import export_run
    from resist.training.device import take_device

    with _lock(config):
        done = export_run(
            config.run,
            config.to,
            config.out,
            scale=config.scale,
            ema=config.ema,
            calibrate=config.calibrate,
            data_dir=config.data_dir,
            device=take_device(config.device),
        )
    print(f"wrote {done.path} ({done.path.stat().st_size / 1e6:.1f} MB)")
    print("\n".join([*_about_scale(done, config.scale), *_how_to_load(done, config)]))
    return 0


def _lock(config: ExportConfig) -> contextlib.AbstractContextManager[object]:
    """The lock of the run directory, if the file goes into it."""
    inside = config.out is None or config.out.resolve().is_relative_to(config.run.resolve())
    is_run = (config.run / "config.json").exists()  # otherwise there is a message about that
    return RunLock(config.run, "export") if inside and is_run else contextlib.nullcontext()


def _about_scale(done: "Export", scale: str) -> list[str]:
    if not done.scales:
        return ["scale: none, no branch of this run's network is scaled"]
    values = " and ".join(f"{value:.4g}" for value in sorted(set(done.scales.values())))
    what = f"scale: the branches of {len(done.scales)} blocks are multiplied by {values}"
    if scale == "keep":
        return [f"{what}, stored apart from the weights"]
    into = ", ".join(dict.fromkeys(name for one in done.folds for name in one.into))
    lines = [f"{what}, folded into their {into}"]
    if done.accuracy is not None:
        before, after = (100 * accuracy for accuracy in done.accuracy)
        lines.append(f"approximate: test accuracy {after:.2f} % instead of {before:.2f} %")
    return [*lines, f"on noise the logits differ from those of the scaled network by {done.difference:.1e} at most"]


def _how_to_load(done: "Export", config: ExportConfig) -> list[str]:
    kept = config.scale == "keep" and bool(done.scales)
    path, recipe = str(done.path), done.recipe
    size = "x".join(map(str, done.data.images.shape[1:]))
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (done.data.mean, done.data.std))
    images = f"images: {size}, RGB in 0 to 1, minus the mean ({mean}), divided by the standard deviation ({std})"
    if config.to == "program":
        return [f"load it (needs torch):\n  import torch\n  model = torch.export.load({path!r}).module()", images]
    if config.to == "onnx":
        return [*_about_runtime(done), *_onnx_lines(path), f"{images}, float32"]
    imports, lines = [recipe.imports], [f"model = {recipe.code}"]
    if done.path.suffix == ".safetensors" and kept:
        imports.append("from resist.export import load_scaled")
        lines.append(f"load_scaled(model, {path!r})")
    elif done.path.suffix == ".safetensors":
        imports.append("from safetensors.torch import load_file")
        lines.append(f"model.load_state_dict(load_file({path!r}))")
    elif kept:
        imports += ["import json", "import torch", "from resist.export import scale_blocks"]
        lines += [
            f"file = torch.load({path!r}, weights_only=True)",
            'model.load_state_dict(file["state_dict"])',
            'scale_blocks(model, json.loads(file["scales"]))  # x + scale * (block(x) - x) of each block',
        ]
    else:
        imports.append("import torch")
        lines.append(f"model.load_state_dict(torch.load({path!r}, weights_only=True))")
    lines.append("model.eval()")
    return [_needs(done, kept), *(f"  {line}" for line in [*imports, *lines]), images]


def _needs(done: "Export", kept: bool) -> str:
    """Say which packages the lines below need, and for what."""
    library = "resist" if done.recipe.library == "resist" else done.recipe.library
    needs = f"{library} for the network's source"
    if kept:
        needs += " and the scale" if done.recipe.library == "resist" else "; resist for the scale"
    reader = ", safetensors" if done.path.suffix == ".safetensors" else ""
    return f"load it (needs {needs}{reader}; --to program needs torch alone):"


def _about_runtime(done: "Export") -> list[str]:
    if done.runtime_difference is None:
        return ["not checked, because onnxruntime is not installed: pip install 'torch-resist[onnx]'"]
    return [f"checked: the logits of onnxruntime differ from torch's by {done.runtime_difference:.1e} at most"]


def _onnx_lines(path: str) -> list[str]:
    return [
        "load it (needs onnxruntime):",
        "  import onnxruntime",
        f"  session = onnxruntime.InferenceSession({path!r})",
        '  model = lambda images: session.run(None, {"images": images})[0]  # NumPy arrays',
    ]
