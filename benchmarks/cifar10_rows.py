"""Rows of the accuracy benchmark: methods to compare, and the settings in which they are compared.

A row is data: what it trains, with which strategy, at which rates. A new idea is one more row, and a rate of its own
for a row is the same row with another factor (`Row.at_rate`). Rows of the same seed see the same batches, and rows of
the same network begin with the same weights, so that differences between rows can be taken seed by seed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resist
from resist.models import build
from resist.planning.wire import FP32, Wire, as_wire

WORKERS = 4
LOCAL_STEPS = 25
CHAIN = "layer3"  # the section whose blocks after the first form the chain
DEPTHS = (3, 4, 23, 3)  # of ResNet101
NUM_BLOCKS = DEPTHS[2] - 1
PLAIN = Wire()
SAME_COMPUTE = 41  # steps of ResIST that take the processor time of LOCAL_STEPS of local SGD
HELD = 6  # blocks of the chain that a worker of ResIST holds by default: ceil(22 / 4)


@dataclass(frozen=True)
class Setting:
    """What all rows of a comparison have in common.

    Attributes:
        name: Name in the results.
        image_size: Height and width; larger images are averaged to it.
        rounds: Rounds of the longest rows.
        batch_size: Images of a worker's batch.
        lr: Highest learning rate of rows with the factor 1; it falls to zero along a cosine.
        data: `cifar10`, or a folder of the data folder with train/CLASS/FILE and val/CLASS/FILE.
    """

    name: str
    image_size: int
    rounds: int
    batch_size: int = 64
    lr: float = 0.05
    data: str = "cifar10"


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("screen", 16, 40),
        Setting("long", 16, 120),
        Setting("short", 32, 40),
        Setting("full", 32, 120),
        Setting("tiny", 16, 60, data="tiny-imagenet-mini"),
    )
}


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        name: Name in the results.
        strategy: (row, number of rounds) -> strategy.
        share: Rounds as a share of the setting's.
        workers: S.
        local_steps: l; with averaging in every step, the steps that count as a round.
        lr: Factor of the setting's learning rate.
        chain_lr: Further factor for the blocks of the chain.
        depths: Blocks of each section.
        width: Channels of the stem.
        survival: Probability that a block of the chain is computed in a step (stochastic depth); None: always.
        ema: Decay of an average of the weights over time that is tested too; None: without one.
        zero_chain: Whether every block of the chain begins as the identity: its last convolution is zero.
        teacher_every: In one step of so many, the full network of the last round is a teacher; 0: never.
        scales: Factors of the scale of the chain's branches at which the final network is tested too.
        wire: Formats of what is sent, as in `Job`.
        plain: Name of the same row with nothing compressed and no fragments; empty: it is this one.
    """

    name: str
    strategy: "Callable[[Row, int], resist.Strategy]"
    share: float = 1.0
    workers: int = WORKERS
    local_steps: int = LOCAL_STEPS
    lr: float = 1.0
    chain_lr: float = 1.0
    depths: tuple[int, int, int, int] = DEPTHS
    width: int = 8
    survival: float | None = None
    ema: float | None = None
    zero_chain: bool = False
    teacher_every: int = 0
    scales: tuple[float, ...] = ()
    wire: Wire = PLAIN
    plain: str = ""

    def at_rate(self, factor: float) -> "Row":
        """Return the row with `factor` times its learning rate, under a name that says so."""
        if factor == 1:
            return self
        end = f", rate x {factor:g}"
        return replace(self, name=self.name + end, lr=self.lr * factor, plain=self.plain and self.plain + end)

    def sent_as(self, wire: str | Wire, fragments: int = 0, delay: int = 1) -> "Row":
        """Return the row with a wire format and fragments, under a name that says so."""
        formats, names = as_wire(wire), [self.name]
        names += [wire if isinstance(wire, str) else wire.shared] if formats.compresses else []
        names += [f"{fragments} fragments, late by {delay} step{'s' * (delay > 1)}"] if fragments else []
        formats = replace(formats, fragments=fragments, delay=delay)
        return replace(self, name=", ".join(names), wire=formats, plain=self.name)

    def network(self, num_classes: int = 10) -> nn.Module:
        """Build the network."""
        model = build(
            "preact_resnet101",
            num_classes=num_classes,
            depths=self.depths,
            width=self.width,
            final_norm=True,
            zero_init=self.zero_chain,
        )
        if self.survival is not None:
            section = model.get_submodule(CHAIN)
            assert isinstance(section, nn.Sequential)
            for number in range(1, len(section)):
                section[number] = Skipped(section[number], self.survival)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
                model.set_submodule(name, Pointwise(module))
        return model.to(memory_format=torch.channels_last)


class Pointwise(nn.Module):
    """A convolution of 1 x 1 as a product of matrices.

    The kernels that oneDNN 3.12 (torch 2.14) has for AVX2 write past the end of such a weight's gradient.

    Args:
        convolution: One of 1 x 1 without padding, groups and bias.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.stride = convolution.weight, convolution.stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1)).permute(0, 3, 1, 2)


class Skipped(nn.Module):
    """A residual block that is skipped at random in training, and scaled by its probability in tests.

    Stochastic depth: Huang et al., 2016. All images of a batch skip it together, so a skipped block costs nothing.

    Args:
        block: Maps x to x plus a branch.
        survival: Probability that it is computed.

    Attributes:
        forced: Skip it (0.0) or compute it (1.0) in every step; None: at random.
    """

    def __init__(self, block: nn.Module, survival: float) -> None:
        super().__init__()
        self.block, self.survival = block, survival
        self.forced: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.survival * (self.block(x) - x)
        chance = self.survival if self.forced is None else self.forced
        return self.block(x) if torch.rand(()) < chance else x


Strategies = Callable[[Row, int], resist.Strategy]


def resist_row(name: str, state: str = "average", *, held: int = HELD, redraw: int = 1, **others: Any) -> Row:
    """Make a row of ResIST whose workers hold `held` blocks all the time, other ones every `redraw` rounds."""

    def strategy(row: Row, rounds: int) -> resist.Strategy:
        return resist.resist(row.workers, row.local_steps, capacities=held, optimizer_state=state, redraw_every=redraw)

    return Row(name, strategy, scales=(0.7, 1.4, 2.0), **others)


def warmed_up(share: float) -> Strategies:
    """Return the strategy of a ResIST that begins with some rounds of local SGD."""
    return lambda row, rounds: resist.resist(
        row.workers, row.local_steps, capacities=HELD, optimizer_state="average", warmup_rounds=round(share * rounds)
    )


def growing(*held: int) -> Strategies:
    """Return the strategy of a ResIST whose workers hold more blocks in each of equal parts of the rounds."""

    def strategy(row: Row, rounds: int) -> resist.Strategy:
        by_round = {rounds * part // len(held): number for part, number in enumerate(held)}
        return resist.resist(
            row.workers, row.local_steps, capacities=resist.Capacities(by_round=by_round), optimizer_state="average"
        )

    return strategy


def local_sgd(row: Row, rounds: int) -> resist.Strategy:
    return resist.local_sgd(row.workers, row.local_steps, optimizer_state="average")


def every_step(row: Row, rounds: int) -> resist.Strategy:
    """Averaging in every step: with each worker's own momentum this is SGD on the mean gradient."""
    return resist.local_sgd(row.workers, 1, optimizer_state="keep")


def diloco(lr: float, momentum: float) -> Strategies:
    return lambda row, rounds: resist.diloco(row.workers, row.local_steps, outer=resist.OuterSGD(lr, momentum))


# Forgetting momentum at each synchronization lowers the mean effective rate: 1 - b(1 - b^l) / (l(1 - b)), b = 0.9.
RESET_RATE = 1 - 0.9 * (1 - 0.9**LOCAL_STEPS) / (LOCAL_STEPS * (1 - 0.9))

BASE = "local SGD"
LOCAL = Row(BASE, local_sgd)
RESIST = resist_row("ResIST, average")
DILOCO = Row("DiLoCo, outer rate 0.7, momentum 0.9", diloco(0.7, 0.9))
SHALLOW = Row("local SGD, depth 7", local_sgd, depths=(3, 4, HELD + 1, 3))  # what a worker of ResIST holds
STOCHASTIC = Row("stochastic depth, averaging in every step", every_step, survival=HELD / NUM_BLOCKS)
LOG4 = Wire("log4", "int8", "int8")
SELDOM = f"{RESIST.name}, drawn every 2 rounds"
# Fewer bits than `--wire int4` has for what is sent by value.
BY_VALUE = {"state int4": Wire("int4", "int8", "int4"), "blocks int6, state int4": Wire("int4", "int6", "int4")}
ROWS = {
    row.name: row
    for row in (
        LOCAL,
        *(
            Row(f"local SGD, {percent} % of the rounds", local_sgd, share=percent / 100)
            for percent in (40, 60, 80, 110)
        ),
        Row("averaging in every step", every_step),
        STOCHASTIC,
        SHALLOW,
        Row("local SGD, width 6", local_sgd, width=6),
        DILOCO,
        *(
            Row(f"DiLoCo, outer rate {lr:g}, momentum {momentum:g}", diloco(lr, momentum))
            for lr, momentum in ((0.7, 0.5), (1.0, 0.3))
        ),
        RESIST,
        *(resist_row(f"ResIST, {state}", state) for state in ("travel", "reset")),
        resist_row("ResIST, reset, rate corrected", "reset", lr=1 / RESET_RATE),
        *(resist_row(f"ResIST, {held} of {NUM_BLOCKS} blocks", held=held) for held in (8, 10, 11, 16, 20)),
        *(resist_row(f"ResIST, average, drawn every {rounds} rounds", redraw=rounds) for rounds in (2, 4)),
        *(resist_row(f"ResIST, chain's rate x {factor:g}", chain_lr=factor) for factor in (0.5, 2.0)),
        Row("ResIST, growing 6, 11, 22", growing(6, 11, 22)),
        Row("ResIST, growing 6, 11", growing(6, 11)),
        replace(resist_row("ResIST, average, EMA 0.99"), ema=0.99),
        replace(resist_row("ResIST, chain begins as the identity"), zero_chain=True),
        replace(resist_row("ResIST, taught by the last round"), teacher_every=4),
        *(Row(f"ResIST after {percent} % of local SGD", warmed_up(percent / 100)) for percent in (10, 33)),
        replace(LOCAL, name="local SGD, chain begins as the identity", zero_chain=True),
        # The time that a step saves, spent on more steps of each round.
        *(
            replace(row, name=f"{name}, {SAME_COMPUTE} steps a round", local_steps=SAME_COMPUTE)
            for name, row in {"ResIST": RESIST, SHALLOW.name: SHALLOW, STOCHASTIC.name: STOCHASTIC}.items()
        ),
        *(
            replace(row, name=f"{row.name}, l = {steps}", local_steps=steps, share=LOCAL_STEPS / steps)
            for row in (LOCAL, RESIST)
            for steps in (10, 50, 100)
        ),
        *(replace(LOCAL, name=f"local SGD, S = {workers}", workers=workers) for workers in (2, 8)),
        *(
            resist_row(f"ResIST, average, S = {workers}", held=-(-NUM_BLOCKS // workers), workers=workers)
            for workers in (2, 8)
        ),
        *(RESIST.sent_as(wire) for wire in ("bf16", "int8", "int6", "int4", LOG4)),
        *(
            replace(RESIST, name=f"{RESIST.name}, int4, {parts}", wire=wire, plain=RESIST.name)
            for parts, wire in BY_VALUE.items()
        ),
        replace(  # the setting of the wire benchmark with the fewest bytes
            resist_row(f"{SELDOM}, int4, state int4, 5 fragments, late by 2 steps", redraw=2),
            wire=replace(BY_VALUE["state int4"], fragments=5, delay=2),
            plain=SELDOM,
        ),
        *(row.sent_as(wire) for row in (LOCAL, DILOCO) for wire in ("int8", "int4")),
        *(
            row.sent_as(wire, fragments, delay)
            for row in (RESIST, LOCAL, DILOCO)
            for wire in (FP32, "int8", "int4")
            for fragments, delay in ((5, 1), (5, 2), (10, 1))  # ten of them have two steps each, and cannot be later
        ),
    )
}
