"""What a training run is told: plain records that the command line fills in, and their JSON.

Each field's docstring is its help text. `TrainConfig.check` finds what is wrong without data, devices or peers.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from resist.errors import UserError
from resist.planning.strategy import OuterSGD, Strategy, ddp, diloco, local_sgd, resist, switch

# Data sets of photographs, which are read from files while the network trains.
STREAMED = ("folder", "imagenet", "voc2007", "voc2012")


@dataclass(frozen=True)
class NetworkConfig:
    task: Literal["classification", "detection"] = "classification"
    """What the network learns: the class of an image, or where in it objects of which classes are."""
    data: str = "digits"
    """Data set: digits (comes with scikit-learn), cifar10, cifar100, synthetic; folder or imagenet (1,000 classes):
    photographs in train/CLASS/* and val/CLASS/* below --data-dir; for detection voc2007 or voc2012."""
    data_dir: Path = Path("data")
    """Where data sets are looked for, and downloaded to."""
    image_size: int | None = None
    """Height and width that photographs are cut to, by default 224. Detection: their shorter side, by default 600; the
    longer one is at most 5/3 of that."""
    data_workers: int = 4
    """Processes that read and decode photographs for each worker; 0: the worker does it itself. The result is the same.
    """
    skip_bad_files: bool = False
    """Leave out files that cannot be read, and folders without images, and count them. All files are tried before the
    training; of folders of classes once: the result is kept in the user's cache folder."""
    model: str = "preact_small"
    """Network: preact_small, preact_resnet101, preact_resnet152 or preact_resnet200; for photographs
    preact_resnet50_imagenet, preact_resnet101_imagenet, preact_resnet152_imagenet or preact_resnet200_imagenet; or one
    of another library, with fresh weights: torchvision:resnet101, timm:vit_small_patch16_224, transformers:vit (or
    :FILE.json)."""
    sections: tuple[int, ...] = ()
    """Blocks in each of the four sections, instead of the model's own (3 4 23 3 for preact_resnet101)."""
    width: int | None = None
    """Channels of the first section, instead of the model's own (64 for preact_resnet101)."""
    final_norm: bool = False
    """Normalize and rectify before the last pooling. The networks of the paper for small images do not; all
    others always do."""
    chain: tuple[str, ...] = ()
    """Blocks to partition, as in layer3:1-22, or layer2 layer3 for the longest run of each. Default: the longest run of
    interchangeable blocks."""
    pretrained: str | None = None
    """Weights to begin with: timm:FILE, the .safetensors or .pth of timm's resnetv2_50, 101 or 152. The head starts
    anew where the number of classes differs."""
    backbone: Path | None = None
    """Detection: a classification run of ours whose network the backbone begins with."""
    splits: tuple[str, ...] = ()
    """Detection: sets to train and to test on. Default: trainval test for voc2007, train val for voc2012."""


@dataclass(frozen=True)
class MethodConfig:
    strategy: Literal["resist", "local_sgd", "diloco", "ddp"] = "resist"
    """resist: a sub-network for each worker. local_sgd, diloco, ddp: the full network for each worker."""
    workers: int = 4
    """Number of workers, S. It belongs to the algorithm; the number of processes does not change the result."""
    local_steps: int = 50
    """Optimizer steps from one synchronization to the next."""
    min_depth: int | None = None
    """Chain blocks that each worker holds at the least, the surplus shared. Default: 4, or a shorter chain."""
    capacities: tuple[int, ...] = ()
    """Chain blocks of each worker, for workers of unequal speed or memory: --capacities 8 6 4 4."""
    warmup_rounds: int = 0
    """Rounds of local SGD before the first round of ResIST."""
    warmup_epochs: float = 0.0
    """The same in epochs, rounded up to whole rounds."""
    batchnorm: Literal["recalibrate", "average", "batch"] = "recalibrate"
    """Statistics of the full network: estimated anew, averaged over the workers, or those of each test batch."""
    optimizer_state: Literal["reset", "keep", "travel", "average"] = "travel"
    """Momentum at a synchronization: forgotten, kept in place, moved with its block, or also averaged where shared."""
    outer: tuple[float, float] | None = None
    """Rate and Nesterov momentum of an outer step along each round's mean change. Default: 0.7 0.9 for diloco."""
    on_nonfinite: Literal["stop", "drop"] = "stop"
    """When a worker's loss or weights are no longer numbers. stop: end the run, the weights kept to be looked at. drop:
    leave its round out of the means; what only it held stays as it was."""
    replicate: bool = False
    """copy: keep every block twice in memory, so that no round is lost with any one worker; see --resume."""
    scale: str = "inclusion"
    """Factor of each chain block's branch in the full network: inclusion (mean capacity / blocks), 1/S, or a number."""
    sampling: Literal["all", "shard"] = "all"
    """all: each worker shuffles the whole set. shard: each worker has its own part of it."""


@dataclass(frozen=True)
class OptimizationConfig:
    epochs: float = 40.0
    """Passes of each worker through the images it draws from."""
    batch_size: int = 128
    """Images of a worker in one step."""
    grad_accum_steps: int = 1
    """Parts that a batch is split into, their gradients added up: less memory for the same batch."""
    lr: float = 0.03
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: float = 5e-4
    """Weight decay, on every parameter."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over all classes; 0.1 is usual for ImageNet."""
    lr_schedule: Literal["step", "cosine", "constant"] = "step"
    """Learning rate over the run. step: a tenth after 50 % and again after 75 %."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to --lr."""


@dataclass(frozen=True)
class MachineConfig:
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    processes: int | None = None
    """Processes on this machine. Default: one for each GPU, or on the CPU one for each worker."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast to bfloat16 in forward and backward. Weights stay in fp32."""
    channels_last: bool = False
    """Keep images and convolutions with the channels innermost, which suits GPUs."""
    compile: bool = False
    """Compile the sub-network with torch.compile, once for the run."""
    restarts: int = 0
    """Times that resist goes on from the last checkpoint when one of the processes that it started has died."""
    timeout_s: float = 600.0
    """Seconds to wait for another worker before giving it up."""
    no_progress: bool = False
    """Print a line now and then instead of a display that is drawn again and again, on a terminal too."""
    tensorboard: bool = False
    """Log to RUN/tensorboard too."""
    wandb: bool = False
    """Log to Weights & Biases too; WANDB_MODE=offline keeps it in RUN/wandb."""


@dataclass(frozen=True)
class RunConfig:
    out: Path | None = None
    """Run directory, which must not exist yet. Default: runs/DATE-TIME-DATA-STRATEGY."""
    seed: int = 0
    """Seed of everything random: initial weights, batches, plans."""
    num_evals: int = 10
    """Times that the full network is assembled and tested, spread evenly, the last at the end."""
    resume: Path | None = None
    """Go on with this run from its newest checkpoint, or from safe copies that are newer. Other options are those of
    the run, but for machine options, --workers, --data-dir, --data-workers, --lr, --replicate and --on-nonfinite,
    which may change."""
    checkpoint_rounds: int = 10
    """Rounds from one checkpoint to the next; one is always written at the end, and on SIGTERM or SIGINT."""
    until: tuple[str, ...] = ()
    """End early, after the round in which one of these is reached: rounds=20, seconds=300 (without evaluations), gb=2
    (sent by all workers), accuracy=0.95 (of the full network, where tested). The schedule stays that of --epochs."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a deep residual network, each worker on a shallower sub-network of it."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise UserError for a value outside its bounds. Model, data and chain are checked by those who know them."""
        for part in (getattr(self, f.name) for f in dataclasses.fields(self)):
            for f in dataclasses.fields(part):
                value = getattr(part, f.name)
                flag = "--" + f.name.replace("_", "-")
                if get_origin(f.type) is Literal and value not in get_args(f.type):
                    raise UserError(f"{flag} {value!r} is not one of {', '.join(get_args(f.type))}")
                if isinstance(value, float) and not math.isfinite(value):
                    raise UserError(f"{flag} {value} is not a finite number")
        least: dict[str, tuple[float | None, float]] = {
            "--batch-size": (self.optimization.batch_size, 1),
            "--grad-accum-steps": (self.optimization.grad_accum_steps, 1),
            "--lr": (self.optimization.lr, 0),
            "--momentum": (self.optimization.momentum, 0),
            "--weight-decay": (self.optimization.weight_decay, 0),
            "--lr-warmup-steps": (self.optimization.lr_warmup_steps, 0),
            "--warmup-rounds": (self.method.warmup_rounds, 0),
            "--warmup-epochs": (self.method.warmup_epochs, 0),
            "--label-smoothing": (self.optimization.label_smoothing, 0),
            "--image-size": (self.network.image_size, 32),
            "--data-workers": (self.network.data_workers, 0),
            "--processes": (self.machine.processes, 1),
            "--num-evals": (self.run.num_evals, 1),
            "--checkpoint-rounds": (self.run.checkpoint_rounds, 1),
            "--restarts": (self.machine.restarts, 0),
        }
        for flag, (value, bound) in least.items():
            if value is not None and value < bound:
                raise UserError(f"{flag} {value} is too small; give at least {bound}")
        for flag, value in (("--epochs", self.optimization.epochs), ("--timeout-s", self.machine.timeout_s)):
            if value <= 0:
                raise UserError(f"{flag} {value} has to be more than 0")
        self._check_pairs()

    def _check_pairs(self) -> None:
        """What is wrong only together."""
        o, method, network = self.optimization, self.method, self.network
        if o.batch_size % o.grad_accum_steps:
            raise UserError(
                f"--batch-size {o.batch_size} cannot be split into --grad-accum-steps {o.grad_accum_steps} equal "
                "parts; make the one a multiple of the other"
            )
        if self.network.task == "detection" and self.machine.compile:
            raise UserError("--compile cannot take a detector, whose regions differ from image to image; leave it out")
        if o.nesterov and o.momentum == 0:
            raise UserError("--nesterov needs a momentum; give --momentum above 0, or leave --nesterov out")
        if o.label_smoothing >= 1:
            raise UserError(f"--label-smoothing {o.label_smoothing} leaves nothing of the labels; give less than 1")
        if method.warmup_rounds and method.warmup_epochs:
            raise UserError("--warmup-rounds and --warmup-epochs say the same; give one of the two")
        for flag, given in (
            ("--image-size", network.image_size is not None),
            ("--data-workers", network.data_workers != NetworkConfig.data_workers),
            ("--skip-bad-files", network.skip_bad_files),
        ):
            if given and network.data not in STREAMED:
                raise UserError(f"{flag} says nothing to --data {network.data}, only to {', '.join(STREAMED)}")
        processes = self.machine.processes
        if processes is not None and processes > method.workers:
            raise UserError(
                f"--processes {processes} exceeds --workers {method.workers}; a process hosts at least one worker"
            )
        if method.strategy != "resist":
            for flag, given in (
                ("--warmup-rounds", method.warmup_rounds > 0),
                ("--warmup-epochs", method.warmup_epochs > 0),
                ("--capacities", bool(method.capacities)),
                ("--min-depth", method.min_depth is not None),
                ("--outer", method.strategy == "ddp" and method.outer is not None),
                ("--replicate", method.strategy == "ddp" and method.replicate),
                ("--on-nonfinite drop", method.strategy == "ddp" and method.on_nonfinite == "drop"),
            ):
                if given:
                    raise UserError(f"{flag} says nothing to --strategy {method.strategy}; leave it out")
        if method.replicate and method.workers < 2:
            raise UserError("--replicate needs a second worker to keep copies; give --workers 2 or more")
        self.strategy()
        self.scale()
        self.budgets()

    def strategy(self) -> Strategy:
        """The strategy that these options name."""
        m = self.method
        outer = None if m.outer is None else OuterSGD(*m.outer)
        if m.strategy == "ddp":
            return ddp(m.workers, m.local_steps)
        if m.strategy == "diloco":
            return diloco(m.workers, m.local_steps, optimizer_state=m.optimizer_state, outer=outer)
        everything = local_sgd(m.workers, m.local_steps, optimizer_state=m.optimizer_state, outer=outer)
        if m.strategy == "local_sgd":
            return everything
        parts = resist(
            m.workers,
            m.local_steps,
            min_depth=m.min_depth,
            capacities=m.capacities or None,
            optimizer_state=m.optimizer_state,
            outer=outer,
        )
        return switch(everything, parts, at_round=m.warmup_rounds) if m.warmup_rounds else parts

    def with_warmup_rounds(self, images_per_epoch: int) -> "TrainConfig":
        """The same with the rounds that `warmup_epochs` are."""
        m = self.method
        if not m.warmup_epochs:
            return self
        rounds = math.ceil(m.warmup_epochs * images_per_epoch / (self.optimization.batch_size * m.local_steps))
        return dataclasses.replace(self, method=dataclasses.replace(m, warmup_rounds=rounds, warmup_epochs=0.0))

    def scale(self) -> str | float:
        text = self.method.scale
        if text in ("inclusion", "1/S"):
            return text
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise UserError(f"--scale {text!r} is not inclusion, 1/S, or a number above 0")
        return number

    def budgets(self) -> dict[str, float]:
        """What `--until` says: by "rounds", "seconds", "gb" or "accuracy" the value that ends the run."""
        found: dict[str, float] = {}
        for text in self.run.until:
            name, _, value = text.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if name not in ("rounds", "seconds", "gb", "accuracy") or not 0 < number < math.inf:
                raise UserError(f"--until {text!r} is not rounds=N, seconds=N, gb=N or accuracy=N with N above 0")
            if name == "accuracy" and number > 1:
                raise UserError(f"--until {text!r}: an accuracy is at most 1; give 0.95 for 95 %")
            found[name] = number
        return found

    def arguments(self) -> list[str]:
        """The command line that says this, without what is as it is by default."""
        words: list[str] = []
        for part in (getattr(self, f.name) for f in dataclasses.fields(self)):
            for f in dataclasses.fields(part):
                value = getattr(part, f.name)
                if value == f.default:
                    continue
                words.append("--" + f.name.replace("_", "-"))
                if isinstance(value, tuple):
                    words += map(str, value)
                elif value is not True:
                    words.append(str(value))
        return words

    def digest(self) -> dict[str, object]:
        """What has to be equal on all hosts; where files lie and what a host is made of may differ."""
        own = {"data_dir", "data_workers", "pretrained", "out", "resume", "device", "processes", "compile", "restarts"}
        own |= {"no_progress", "tensorboard", "wandb"}
        flat = {name: value for part in self.to_json().values() for name, value in part.items()}
        return {f"--{name.replace('_', '-')}": value for name, value in flat.items() if name not in own}

    def to_json(self) -> dict[str, dict[str, object]]:
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def from_json(data: object) -> TrainConfig:
    """The configuration that `to_json` gave. Raises UserError, naming the field, for anything else."""
    return _record(TrainConfig, data, "")


def _record(kind: Any, data: object, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise UserError(f"configuration {where or 'file'} is not a table of names and values")
    hints, values = get_type_hints(kind), {}
    for name, value in data.items():
        full = f"{where}.{name}".lstrip(".")
        if name not in hints:
            raise UserError(f"configuration has the unknown entry {full!r}; it comes from another version of resist")
        nested = dataclasses.is_dataclass(hints[name])
        values[name] = _record(hints[name], value, full) if nested else _value(hints[name], value, full)
    return kind(**values)


def _value(hint: Any, value: object, where: str) -> object:
    """`value` as read from JSON, as the type that `hint` says."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        fits = value in options
    elif get_origin(hint) is tuple:
        fits = isinstance(value, list) and all(type(item) is options[0] for item in value)
        value = tuple(value) if isinstance(value, list) else value
    elif type(None) in options:  # an optional value
        return None if value is None else _value(options[0], value, where)
    elif hint is Path:
        fits = isinstance(value, str)
        value = Path(value) if isinstance(value, str) else value
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = type(value) is hint
    if not fits:
        raise UserError(f"configuration entry {where} has the value {value!r}, which is not a {hint}")
    return float(value) if hint is float else value  # type: ignore[arg-type]
