"""`resist export`: the network of a run for people who do not use this package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resist.export import Export, export_run
from resist.training.device import pick_device


@dataclass(frozen=True)
class ExportConfig:
    """Write the network that a run left behind as others read it."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    to: Literal["safetensors", "torch", "torchvision", "timm", "program"]
    """safetensors: weights and metadata. torch: a plain state dict. torchvision, timm: what their networks load, for
    runs of theirs. program: a torch.export program, which runs without the network's source."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write, which must not exist yet. Default: exported.safetensors (.pt, .pt2; exported-timm.safetensors) in
    the run directory."""
    scale: Literal["fold", "keep", "approximate"] = "fold"
    """Factor of each chain block's branch. fold: multiplied into the weights, exactly. keep: left to the reader, in the
    metadata. approximate: folded even if an activation follows the block's sum; tells the accuracy of both."""
    calibrate: bool = False
    """Estimate BatchNorm statistics on training images first. Runs with --batchnorm batch need it."""
    data_dir: Path | None = None
    """Where the data set lies, for --calibrate and --scale approximate. Default: as when it was trained."""
    device: str = "auto"
    """Where images are run through the network, for the same two: cpu, cuda, or auto."""


def run_export(config: ExportConfig, arguments: list[str]) -> int:
    done = export_run(
        config.run,
        config.to,
        config.out,
        scale=config.scale,
        calibrate=config.calibrate,
        data_dir=config.data_dir,
        device=pick_device(config.device),
    )
    print(f"wrote {done.path} ({done.path.stat().st_size / 1e6:.1f} MB)")
    print("\n".join([*_about_scale(done, config.scale), *_how_to_load(done, config)]))
    return 0


def _about_scale(done: Export, scale: str) -> list[str]:
    if not done.scales:
        return ["scale: none, no branch of this run's network is scaled"]
    values = " and ".join(f"{value:.4g}" for value in sorted(set(done.scales.values())))
    what = f"scale: the branches of {len(done.scales)} blocks are multiplied by {values}"
    if scale == "keep":
        return [f"{what}, kept apart from the weights"]
    into = ", ".join(dict.fromkeys(name for one in done.folds for name in one.into))
    lines = [f"{what}, folded into their {into}"]
    if done.accuracy is not None:
        before, after = (100 * accuracy for accuracy in done.accuracy)
        lines.append(f"approximate: test accuracy {after:.2f} % instead of {before:.2f} %")
    return [*lines, f"on noise the logits differ from those of the scaled network by {done.difference:.1e} at most"]


def _how_to_load(done: Export, config: ExportConfig) -> list[str]:
    kept = config.scale == "keep" and bool(done.scales)
    path, recipe = str(done.path), done.recipe
    size = "x".join(map(str, done.data.images.shape[1:]))
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (done.data.mean, done.data.std))
    images = f"images: {size}, RGB in 0 to 1, less the mean ({mean}), over the deviation ({std})"
    if config.to == "program":
        return [f"load it:\n  import torch\n  model = torch.export.load({path!r}).module()", images]
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
    return ["load it:", *(f"  {line}" for line in [*imports, *lines]), images]
