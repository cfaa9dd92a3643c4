"""`resist cost`: predict the traffic, memory and time of each strategy."""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resist.errors import UserError
from resist.planning.assign import whole_draws
from resist.planning.methods import METHODS, build_strategy
from resist.planning.strategy import Strategy
from resist.runs.bounds import check_device, check_size
from resist.runs.capacity_keys import capacities_of
from resist.runs.config import MethodConfig, NetworkConfig, OptimizationConfig, TrainConfig, config_key

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor, nn

    from resist.cost import GpuSettings, Report, Speed
    from resist.cost.footprint import Loss
    from resist.cost.links import Links

# Numbers of the links and devices, and of the method.
LINKS = ("link_gbit_s", "latency_ms", "images_s")
METHOD = ("workers", "capacities", "local_steps", "batch_size", "min_depth", "redraw_every", "num_classes", "processes")
# Rounds over which traffic is averaged, at least.
ROUNDS = 50
# How a link is given, in a message.
LINK = "--link-gbit-s or --link-file"


@dataclass(frozen=True)
class CostConfig:
    """Predict bytes, memory, FLOPs and, for given links and devices, seconds of each strategy. Trains nothing."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    num_classes: int | None = None
    """Classes of the head. Default: those of --data."""
    workers: tuple[int, ...] = (2, 4, 8)
    """Numbers of workers to predict."""
    strategies: tuple[str, ...] = tuple(METHODS)
    """Strategies to predict."""
    local_steps: int = 50
    """Optimizer steps from one synchronization to the next."""
    batch_size: int = 128
    """Images per worker and step."""
    min_depth: int | None = None
    """Minimum number of blocks of each worker in each chain. Default: 4, or all blocks of a shorter chain."""
    capacities: tuple[int, ...] | Literal["auto"] = ()
    """Blocks of each worker in each chain, as in 8 6 4 4; for one number of workers. Train alone takes auto."""
    capacities_by_chain: tuple[str, ...] = config_key(())
    capacities_by_round: tuple[str, ...] = config_key(())
    redraw_every: int = config_key(1)
    optimizer_state: Literal["reset", "keep", "travel", "average"] = "travel"
    """Momentum at a synchronization. reset: set to zero. travel: moves with its block. average: as travel, and that of
    the shared part is averaged too. keep: stays where it is."""
    optimizer: str = "sgd"
    """A class of torch.optim by its name, or timm:NAME, whose state is counted."""
    momentum: float | None = config_key(None)
    optimizer_args: dict[str, Any] = field(default_factory=dict, metadata={"option": False})
    model_ema_decay: float | None = None
    """Count an exponential moving average (EMA) of the weights, with any decay."""
    replicate: bool = False
    """Count the memory and the bytes of a replica of every block."""
    wire: Literal["fp32", "bf16", "int8", "int6", "int4"] = "fp32"
    """Format of the weights and momentum that are sent; see train."""
    wire_parts: tuple[str, ...] = config_key(())
    fragments: int | Literal["auto"] = 0
    """Number of fragments in which the shared part is averaged during the round; see train, which alone takes auto."""
    delay: int = config_key(1)
    link_gbit_s: float | None = None
    """Rate of each worker's link in Gbit/s, in each direction. With a speed of the devices, seconds are
    predicted."""
    latency_ms: float = 0.0
    """One-way latency of a link in milliseconds."""
    link_file: Path | None = None
    """Links as resist probe has measured them, in place of --link-gbit-s and --latency-ms: one for each worker."""
    images_s: tuple[float, ...] = ()
    """Training speed of the full network on one device, in images per second: one number, or one per worker."""
    calibrate: bool = False
    """Measure --images-s on --device of this machine."""
    device: str = "auto"
    """Device of the run, and of --calibrate: cpu, cuda, or auto: cuda where there is a GPU. With cuda, the memory of a
    GPU is predicted; only --calibrate needs one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which --calibrate measures; memory is predicted for fp32."""
    processes: int | None = None
    """Processes of the run, each with a GPU of its own. Default: one for each worker."""
    json: bool = False
    """Print JSON."""


def run_cost(config: CostConfig, given: frozenset[str]) -> int:
    """Predict and print. Returns the exit status."""
    from rich.console import Console

    from resist.cost import print_table

    _check_sizes(config)
    report = _predict(config, given)
    if config.json:
        print(json.dumps(report.to_json()))
    else:
        print_table(report, Console(highlight=False, soft_wrap=True))
        _print_notes(config)
    return 0


def _predict(config: CostConfig, given: frozenset[str]) -> "Report":
    from resist.cost import predict
    from resist.cost.footprint import mean_square
    from resist.tasks import image_shape, network_builder
    from resist.tasks.preflight import example_of
    from resist.training.optimizers import optimizer_for, resolve

    link = _link(config)
    if config.link_file is not None and link is not None and "workers" not in given:
        config = replace(config, workers=(len(link.each),))
    wire = MethodConfig(
        wire=config.wire, wire_parts=config.wire_parts, fragments=config.fragments, delay=config.delay
    ).wires()
    strategies = _strategies(config)
    network, loss = config.network, mean_square
    if network.task == "detection":
        from resist.models.faster_rcnn import dense_pass as loss
    shape = image_shape(network)
    build_model = network_builder(network, config.num_classes, shape[-1])
    measured: dict[str, Any] = {  # whether on the meta device or by the clock
        "chains": network.chain,
        "example": example_of(network),
        "batch_size": config.batch_size,
        "image_shape": shape,
        "build_optimizer": partial(optimizer_for, resolve(_optimization(config))),
    }
    speeds = _speeds(config, build_model, loss, measured)
    if (link is None) != (not speeds):
        raise UserError(f"seconds need both a link ({LINK}) and a speed (--images-s or --calibrate); give both or none")
    return predict(
        build_model,
        strategies,
        loss=loss,
        replicate=config.replicate,
        average=config.model_ema_decay is not None,
        wire=wire,
        link=link,
        speed=speeds or None,
        rounds=whole_draws(ROUNDS, config.redraw_every),
        gpu=_gpu(config),
        **measured,
    )


def _speeds(
    config: CostConfig, build_model: "Callable[[], nn.Module]", loss: "Loss", measured: "Mapping[str, Any]"
) -> "list[Speed]":
    """Return the speeds of the devices: as given, or one that is measured now; none: neither."""
    from resist.cost import Speed, calibrate
    from resist.training.device import take_device

    if not config.calibrate:
        return [Speed(images_s) for images_s in config.images_s]
    if config.images_s:
        raise UserError("--calibrate measures --images-s; give one of the two")
    device = take_device(config.device, fixed_shapes=config.network.task == "classification")
    in_precision = partial(_loss_in_precision, loss, device, config.precision)
    return [calibrate(build_model, loss=in_precision, device=device, **measured)]


def _gpu(config: CostConfig) -> "GpuSettings | None":
    """Return the settings of a run on GPUs; None for one on the CPU."""
    from resist.cost import GpuSettings
    from resist.data import device_bytes
    from resist.tasks import largest_test_batch
    from resist.training.device import on_gpu

    if not on_gpu(config.device):
        return None
    return GpuSettings(
        processes=config.processes,
        data_bytes=device_bytes(config.network.data),
        test_batch=largest_test_batch(config.network),
    )


def _link(config: CostConfig) -> "Links | None":
    """Return the links of the workers, if they are given. Raises UserError for options that contradict each other."""
    from resist.cost.links import Link, Links, read_links

    if config.link_file is not None:
        for name, given in (("link_gbit_s", config.link_gbit_s is not None), ("latency_ms", config.latency_ms != 0)):
            if given:
                raise UserError(f"`link_file` has what `{name}` says; give one of the two")
        return read_links(config.link_file)
    if config.latency_ms and config.link_gbit_s is None:
        raise UserError(f"--latency-ms {config.latency_ms} has no effect without --link-gbit-s; give both")
    return None if config.link_gbit_s is None else Links((Link(config.link_gbit_s, config.latency_ms),))


def _loss_in_precision(
    loss: "Loss", device: "torch.device", precision: str, model: "nn.Module", images: "Tensor"
) -> "Tensor":
    from resist.training.device import autocast

    with autocast(device, precision):
        return loss(model, images)


def _print_notes(config: CostConfig) -> None:
    """Print which options have had no effect, and which would have."""
    from resist.training.device import on_gpu

    if config.processes is not None and not on_gpu(config.device):
        print("\n--processes has no effect without --device cuda.")
    if config.precision != "fp32" and not config.calibrate:
        print("\n--precision has no effect without --calibrate.")
    if config.link_gbit_s is None and config.link_file is None:
        print(f"\nFor seconds and a verdict, give {LINK}, and --images-s or --calibrate.")


def _optimization(config: CostConfig) -> OptimizationConfig:
    """Collect the options of the optimizer that decide its state. Raises UserError where one of them is invalid."""
    o = OptimizationConfig(
        optimizer=config.optimizer,
        optimizer_args=config.optimizer_args,
        momentum=config.momentum,
        model_ema_decay=config.model_ema_decay,
        lr=1e-3,  # any: some optimizers have no default
        lr_schedule="constant",  # which all optimizers take
    )
    TrainConfig(optimization=o).check()
    return o


def _check_sizes(config: CostConfig) -> None:
    check_device(config.device)
    for name in ("fragments", "capacities"):
        if getattr(config, name) == "auto":
            raise UserError(f"`{name}=auto` is chosen in a run, from what it measures; give numbers")
    for name in (*METHOD, *LINKS):
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            check_size(name, number)


def _strategies(config: CostConfig) -> list[Strategy]:
    """Build the strategies to predict, by number of workers. Raises UserError where one of the options is invalid."""
    for name in ("min_depth", "capacities", "capacities_by_chain", "capacities_by_round", "redraw_every"):
        given = getattr(config, name) != getattr(CostConfig, name)
        if given and not any("capacities" in METHODS[s].options for s in config.strategies if s in METHODS):
            methods = ", ".join(key for key, method in METHODS.items() if "capacities" in method.options)
            raise UserError(f"`{name}` has no effect without strategy {methods}; add it, or remove the option")
    if all(name in METHODS and METHODS[name].build(1).every_step for name in config.strategies):
        for name in ("optimizer_state", "replicate", "wire", "wire_parts", "fragments", "delay"):
            if getattr(config, name) != getattr(CostConfig, name):
                only = " ".join(dict.fromkeys(config.strategies))
                raise UserError(f"`{name}` has no effect with `strategies={only}`; remove it, or add a strategy")
    assert config.capacities != "auto"
    capacities = capacities_of(
        by_worker=config.capacities,
        by_chain=config.capacities_by_chain,
        by_round=config.capacities_by_round,
        min_depth=config.min_depth,
    )
    options = {"capacities": capacities, "optimizer_state": config.optimizer_state, "redraw_every": config.redraw_every}
    return [
        build_strategy(name, workers, config.local_steps, **options)
        for workers in config.workers
        for name in config.strategies
    ]
