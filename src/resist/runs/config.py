"""Options of a training run: plain records that the command line fills in, and their JSON.

The docstring of each field is its help text; a name in backticks is another option. A field whose value is
`config_key(default)` is not an option of the command line, only a key of a configuration file. `TrainConfig.check`
needs no data, devices or other processes, and no torch.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from resist.errors import UserError
from resist.planning.capacities import Capacities
from resist.planning.methods import DEFAULT, METHODS, build_strategy
from resist.planning.strategy import ROUND_OPTIONS, OuterSGD, Strategy
from resist.planning.wire import Wire, as_wire
from resist.runs.bounds import check_device, check_values
from resist.runs.capacity_keys import capacities_of
from resist.runs.elastic import check_elastic
from resist.runs.recipe import DETECTION, STREAMED, check_recipe

if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[tuple(METHODS)]


def config_key(default: Any) -> Any:
    """Define a field that only a configuration file can set, not an option of the command line."""
    return field(default=default, metadata={"option": False})


def is_option(f: "dataclasses.Field[Any]") -> bool:
    """Return True for a field that the command line has an option for."""
    return f.metadata.get("option", True)


@dataclass(frozen=True)
class NetworkConfig:
    """The network, the data, and the blocks to partition."""

    data: str = "digits"
    """Data set: digits (comes with scikit-learn), cifar10, cifar100, synthetic; folder or imagenet (1,000 classes):
    photographs in train/CLASS/* and val/CLASS/* under `data_dir`; voc2007 or voc2012: detection of objects."""
    data_dir: Path = Path("data")
    """Directory of the data sets; missing ones that can be downloaded are stored there."""
    image_size: int | None = None
    """Height and width of the crops of photographs, by default 224. Detection: length of the shorter side, by default
    600; the longer side is at most 5/3 of that."""
    data_workers: int | None = None
    """Processes that read and decode photographs for each worker; 0: the worker does it itself. The result does not
    change. Default: the cores divided by the workers of the machine, at most 4."""
    skip_bad_files: bool = False
    """Skip and count files that cannot be read, and folders without images. All files are read before training; for
    folders of classes the result is kept in the user's cache folder."""
    model: str = "preact_small"
    """Network: preact_small, preact_resnet101, preact_resnet152 or preact_resnet200; for photographs
    preact_resnet50_imagenet, preact_resnet101_imagenet, preact_resnet152_imagenet or preact_resnet200_imagenet; or one
    of another library, with new weights: torchvision:resnet101, timm:vit_small_patch16_224, transformers:vit (or
    :FILE.json)."""
    model_args: tuple[str, ...] = ()
    """Shape of a preact network: depths=3,4,23,3 (blocks in each of the four sections), width=64 (channels of the first
    section), and for small images final_norm=true (BatchNorm and ReLU before the last pooling, which the paper's
    networks do not have). zero_init=true: the blocks of the long section begin as the identity. Default: as the name
    of the network says."""
    chain: tuple[str, ...] = ()
    """Blocks to partition, as in layer3:1-22, layer2 layer3 for the longest run of each, or all for all that can be
    partitioned together. Default: the longest run of interchangeable blocks."""
    init_from: str | None = None
    """Initial weights: timm:FILE, the .safetensors or .pth of timm's resnetv2_50, 101 or 152; for detection also the
    directory of a resist run of classification, whose weights initialize the backbone. The head is initialized from
    scratch where the number of classes differs."""
    splits: tuple[str, ...] = config_key(())
    """Detection: splits for training and for testing. Default: trainval test for voc2007, train val for voc2012."""

    @property
    def task(self) -> Literal["classification", "detection"]:
        """The task, which follows from the data set."""
        return "detection" if self.data in DETECTION else "classification"


@dataclass(frozen=True)
class MethodConfig:
    """The distributed algorithm: which worker holds what, and what a synchronization does."""

    strategy: StrategyName = DEFAULT
    """resist: a sub-network for each worker. All others: the full network for each worker."""
    workers: int = 4
    """Number of workers, S. It changes the result; the number of processes does not."""
    local_steps: int = 50
    """Optimizer steps from one synchronization to the next."""
    min_depth: int | None = None
    """Minimum number of blocks of each worker in each chain, so that several workers may hold a block. Default: 4, or
    all blocks of a shorter chain."""
    capacities: tuple[int, ...] | Literal["auto"] = ()
    """Blocks of each worker in each chain, for workers of unequal speed or memory, as in 8 6 4 4. auto: as many as
    `min_depth` says, and blocks then move from slow workers to fast ones, by the times of the last rounds."""
    capacities_by_chain: tuple[str, ...] = config_key(())
    """Blocks of each worker in single chains: layer3=6 for all workers, layer3=8,6,4,4 for each; other chains follow
    `capacities` or `min_depth`."""
    capacities_by_round: tuple[str, ...] = config_key(())
    """Blocks of each worker that change during the run: 13=11 after 13 rounds, or 13:layer3=8,6,4,4 in one chain."""
    redraw_every: int = config_key(1)
    """Rounds from one draw of the sub-networks to the next. In between every worker keeps its blocks, and fewer bytes
    are sent."""
    warmup_rounds: int = 0
    """Rounds of local SGD before the first round of ResIST."""
    batchnorm: Literal["recalibrate", "average", "batch"] = "recalibrate"
    """BatchNorm statistics of the full network: re-estimated before each test, averaged over the workers, or those of
    each test batch."""
    optimizer_state: Literal["reset", "keep", "travel", "average"] = "travel"
    """Momentum at a synchronization. reset: set to zero. travel: moves with its block, averaged over its
    holders. average: as travel, and that of the shared part is averaged too. keep: stays where it is."""
    outer: tuple[float, float] | None = config_key(None)
    """Learning rate and Nesterov momentum of an outer optimizer step along each round's mean change. Default: 0.7 0.9
    for diloco, none for other strategies."""
    on_nonfinite: Literal["stop", "drop"] = "stop"
    """What to do when a worker's loss or weights become NaN or inf. stop: end the run and save the weights for
    inspection. drop: exclude the worker's round from the averages; blocks that only it holds keep their old weights."""
    replicate: bool = False
    """Keep a replica of every block, so that losing one worker costs at most the current round; see `resume`."""
    wire: Literal["fp32", "bf16", "int8", "int6", "int4"] = "fp32"
    """Format of the weights and momentum that are sent. fp32: as they are. Others send 2 to 7 times fewer bytes: the
    change of the shared part in this format, blocks and momentum in one of 8 or 16 bits; see `wire_parts`."""
    wire_parts: tuple[str, ...] = config_key(())
    """Formats of single parts instead of those that `wire` stands for: shared=int4 blocks=bf16 state=fp32."""
    fragments: int | Literal["auto"] = 0
    """Average the shared part (or all weights, if workers hold them) in this number of fragments, each at a time of its
    own in the round, while training goes on; 0: all of it at the round's end. A round needs 2 steps for each. auto:
    as many as hide the exchange, from the times of the first two rounds."""
    delay: int = config_key(1)
    """Steps from the beginning of a fragment's mean to its end: more for a slow link, and less is better for accuracy.
    Must be less than `local_steps` / `fragments`."""
    scale: str = config_key("inclusion")
    """Factor of each chain block's branch in the full network: inclusion (mean capacity / blocks), 1/S, or a number
    above 0."""
    sampling: Literal["all", "shard"] = config_key("all")
    """all: each worker draws from the whole training set. shard: each worker draws from its own part of it."""

    def all_capacities(self) -> Capacities:
        """Return the record of capacities, by worker, chain and round. Raises UserError for a text of another form."""
        return capacities_of(
            by_worker=() if self.capacities == "auto" else self.capacities,
            by_chain=self.capacities_by_chain,
            by_round=self.capacities_by_round,
            min_depth=self.min_depth,
        )

    @property
    def wire_text(self) -> str:
        """What the wire is, in short: "fp32", or "int8 shared=int4, 5 fragments"."""
        fragments = f", {self.fragments} fragment{'s' * (self.fragments != 1)}" if self.fragments else ""
        return " ".join([self.wire, *self.wire_parts]) + fragments + (f", delay {self.delay}" if self.delay > 1 else "")

    def wires(self) -> Wire:
        """Return the wire formats and fragments; none for "auto", before they are chosen.

        Raises:
            UserError: A part or a format does not exist, or fragments and delay do not fit each other.
        """
        wire, given = as_wire(self.wire), set[str]()
        for text in self.wire_parts:
            part, _, format = text.partition("=")
            if part not in wire.formats:
                raise UserError(f"`wire_parts={text}`; give a part and its format, as in shared=int4 or blocks=bf16")
            if part in given:
                raise UserError(f"`wire_parts={text}` is the second format of {part}; give one")
            given.add(part)
            wire = dataclasses.replace(wire, **{part: format})
        if self.fragments == "auto":
            if self.delay != MethodConfig.delay:
                raise UserError(f"`delay={self.delay}` is chosen with `fragments=auto`; remove one of the two")
            return wire
        return dataclasses.replace(wire, fragments=self.fragments, delay=self.delay)

    def without_effect(self) -> dict[str, Any]:
        """Return the options that were changed and have no effect with the strategy, with their defaults."""
        method = METHODS[self.strategy]
        unused = {name for other in METHODS.values() for name in other.options} - method.options
        if "capacities" in unused:
            unused |= {"capacities_by_chain", "capacities_by_round"}
        if method.build(1).every_step:  # nothing is exchanged at the end of a round
            unused |= {*ROUND_OPTIONS, "wire_parts"}
        return {
            f.name: f.default
            for f in dataclasses.fields(self)
            if f.name in unused and getattr(self, f.name) != f.default
        }


@dataclass(frozen=True)
class OptimizationConfig:
    """The optimizer, its learning rate over the run, and the length of the run."""

    epochs: float = 40.0
    """Passes of each worker over the images that it draws from."""
    batch_size: int = 128
    """Images per worker and step."""
    grad_accum_steps: int = 1
    """Parts that each batch is split into; their gradients are accumulated: less memory for the same batch."""
    optimizer: str = "sgd"
    """A class of torch.optim by its name, as in sgd, adamw or rmsprop, or timm:NAME, as in timm:lamb."""
    optimizer_args: dict[str, Any] = field(default_factory=dict, metadata={"option": False})
    """Further arguments of the optimizer by name, as in {"betas": [0.9, 0.95], "eps": 1e-6}."""
    lr: float | None = None
    """Learning rate. Default: 0.03 for sgd, for another optimizer its own default."""
    momentum: float | None = config_key(None)
    """Momentum. Default: 0.9 for sgd, for another optimizer its own default."""
    nesterov: bool | None = config_key(None)
    """Use Nesterov momentum. Default: no for sgd, for another optimizer its own default."""
    weight_decay: float | None = None
    """Weight decay of every parameter. Default: 5e-4 for sgd, for another optimizer its own default."""
    no_decay_norm_and_bias: bool = config_key(False)
    """No weight decay of biases and of parameters with one dimension, which are those of norms."""
    clip_grad_norm: float | None = config_key(None)
    """Largest norm of a worker's gradient; a longer one is scaled down to it."""
    model_ema_decay: float | None = None
    """Also keep an exponential moving average (EMA) of the weights with this decay, as in 0.999; it is tested and saved
    beside the weights."""
    label_smoothing: float = config_key(0.0)
    """Part of each label that is distributed evenly over all classes; 0.1 is usual for ImageNet."""
    mixup: float = config_key(0.0)
    """Mix pairs of images and their labels, in a share drawn from Beta(mixup, mixup); 0.2 is usual for ImageNet."""
    cutmix: float = config_key(0.0)
    """Paste a part of another image, and that share of its label; the area is drawn from Beta(cutmix, cutmix). With
    `mixup` too, each batch has one of the two at random."""
    rand_augment: tuple[int, int] | None = config_key(None)
    """Augment photographs by RandAugment: number of operations and magnitude, 0 to 30, as in 2 9."""
    lr_schedule: Literal["step", "cosine", "constant"] = "step"
    """Learning rate over the run. step: divided by 10 after 50 % and again after 75 %. cosine: to 0. constant: no
    change."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to `lr`."""


@dataclass(frozen=True)
class MachineConfig:
    """Options of this machine. They may differ between machines."""

    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is a GPU."""
    processes: int | None = None
    """Processes on this machine. Default: one per GPU, or on the CPU one per worker, at most 64 or 8 per core."""
    backend: Literal["auto", "gloo", "nccl"] = config_key("auto")
    """How weights go between processes. auto: NCCL if each process has a GPU of its own, else gloo."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16: autocast to bfloat16 in forward and backward; weights stay in fp32."""
    deterministic: bool = config_key(False)
    """Use only algorithms that give the same numbers each time, on a GPU too, where they are slower; an operation that
    has none ends the run. On the CPU runs repeat anyway."""
    channels_last: bool = config_key(True)
    """Use the channels_last memory format for images and 4-D weights: convolutions are faster on GPUs and on CPUs."""
    compile: bool = False
    """Compile each sub-network with torch.compile, once per run."""
    elastic: str | None = None
    """Let processes come and go, one worker each: at least and at most so many, as in 2:8. Those that are lost do not
    end the run, and those that join are given blocks between two rounds. It begins with `workers` of them, by default
    the most."""
    restarts: int = 0
    """Number of times to restart from the last checkpoint after a process has died."""
    timeout_s: float = 600.0
    """Seconds to wait for another process before reporting it as lost."""
    no_progress: bool = config_key(False)
    """Print log lines instead of the live display."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log to TensorBoard files in RUN/tensorboard, or to Weights & Biases (RUN/wandb with WANDB_MODE=offline)."""


@dataclass(frozen=True)
class RunConfig:
    """The run directory, the seed, evaluations, checkpoints and the end of the run."""

    out: Path | None = None
    """Run directory, which must not exist yet. Default: runs/DATE-TIME-DATA-STRATEGY."""
    seed: int = 0
    """Seed of initial weights, batches and plans."""
    num_evals: int | None = None
    """Number of times to assemble and test the full network, spread evenly; the last is at the end. Default: as many as
    take less than a tenth of the run, at most 10."""
    evaluation: Literal["auto", "all", "one"] = config_key("auto")
    """Processes that test the full network. all: each takes a share of the images. one: that of worker 0, while the
    others wait. auto: all, where memory and link allow it and it takes less time."""
    resume: Path | None = None
    """Directory of a run to continue from its newest checkpoint, or from newer replicas. Only machine options and
    `workers`, `data_dir`, `data_workers`, `lr`, `replicate` and `on_nonfinite` may change; all others are those of the
    run."""
    checkpoint_rounds: int = 10
    """Rounds between checkpoints; one is always written at the end, and on SIGTERM, SIGINT or SIGUSR1."""
    until: tuple[str, ...] = ()
    """Stop after the round in which one of these is reached: rounds=20, seconds=300 (without evaluations); or after the
    next round: gb=2 (sent by all workers), accuracy=0.95 (of the full network, when tested). The learning rate still
    follows `epochs`."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a deep residual network, each worker on a shallower sub-network of it."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise UserError for a value outside its bounds. Model, data and chain are checked where they are used."""
        for part in (getattr(self, f.name) for f in dataclasses.fields(self)):
            check_values(part)
        check_device(self.machine.device)
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Raise UserError for values that are invalid only in combination."""
        o, method, network = self.optimization, self.method, self.network
        if o.batch_size % o.grad_accum_steps:
            raise UserError(
                f"`batch_size={o.batch_size}` is not a multiple of `grad_accum_steps={o.grad_accum_steps}`; "
                "change one of the two"
            )
        if self.network.task == "detection" and self.machine.compile:
            raise UserError("`compile` does not support detection, whose tensor shapes vary by image; remove it")
        check_recipe(o, network.data)
        for name, given in (
            ("image_size", network.image_size is not None),
            ("data_workers", network.data_workers != NetworkConfig.data_workers),
            ("skip_bad_files", network.skip_bad_files),
        ):
            if given and network.data not in STREAMED:
                raise UserError(
                    f"`{name}` has no effect with `data={network.data}`, only with {', '.join(STREAMED)}; remove it"
                )
        processes = self.machine.processes
        if processes is not None and processes > method.workers:
            raise UserError(
                f"`processes={processes}` exceeds `workers={method.workers}`; give at most one process per worker"
            )
        for name in method.without_effect():
            raise UserError(f"`{name}` has no effect with `strategy={method.strategy}`; remove it")
        self.strategy().check_round_options(
            replicate=method.replicate, on_nonfinite=method.on_nonfinite, wire=method.wires()
        )
        self.scale()
        self.budgets()
        check_elastic(self)

    def strategy(self) -> Strategy:
        """Build the strategy that these options describe."""
        m = self.method
        if m.outer is not None and len(m.outer) != 2:
            raise UserError(f"`outer={' '.join(map(str, m.outer))}`; give two numbers, learning rate and momentum")
        outer = None if m.outer is None else OuterSGD(*m.outer)
        return build_strategy(
            m.strategy,
            m.workers,
            m.local_steps,
            capacities=m.all_capacities(),
            optimizer_state=m.optimizer_state,
            outer=outer,
            redraw_every=m.redraw_every,
            warmup_rounds=m.warmup_rounds,
        )

    def scale(self) -> str | float:
        """Return `method.scale` as "inclusion", "1/S" or a number. Raises UserError for another value."""
        text = self.method.scale
        if text in ("inclusion", "1/S"):
            return text
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise UserError(f"`scale={text!r}` is not inclusion, 1/S, or a number above 0")
        return number

    def budgets(self) -> dict[str, float]:
        """Return the limits of `run.until` by "rounds", "seconds", "gb" or "accuracy". Raises UserError for others."""
        limits: dict[str, float] = {}
        for text in self.run.until:
            name, _, value = text.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if name not in ("rounds", "seconds", "gb", "accuracy") or not 0 < number < math.inf:
                raise UserError(f"`until={text!r}` is not rounds=N, seconds=N, gb=N or accuracy=N with N above 0")
            if name == "rounds" and number != int(number):
                raise UserError(f"`until={text!r}`: give a whole number of rounds")
            if name == "accuracy" and number > 1:
                raise UserError(f"`until={text!r}`: an accuracy is at most 1; give 0.95 for 95 %")
            if name in limits:
                raise UserError(f"`until={text!r}` is the second limit of {name}; give one")
            limits[name] = number
        return limits

    def digest(self) -> dict[str, object]:
        """Return the options that must be equal on all machines, without paths and machine options."""
        local = {
            "data_dir", "data_workers", "init_from", "out", "resume", "device", "processes", "compile", "restarts",
            "no_progress", "log",
        }  # fmt: skip
        flat = {name: value for part in self.to_json().values() for name, value in part.items()}
        return {name: value for name, value in flat.items() if name not in local}

    def to_json(self) -> dict[str, dict[str, object]]:
        """Return the fields of each part as JSON data."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))
