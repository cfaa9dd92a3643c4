"""The methods of this package, as one of the methods that are compared (competitors.py).

Options of a method, after commas:

optimizer_state     policy for the momentum at a synchronization
min_depth           lower bound of a worker's blocks; capacities=7/3: blocks of each worker
redraw_every        rounds from one draw of the sub-networks to the next
wire                wire format: a name (int8), or one for each of shared part, blocks and state (log4/int8/int8)
fragments, delay    number of fragments of the shared part, and steps that each is late
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.optim import SGD

import resist
from resist.planning.methods import build_strategy
from resist.planning.plan import RoundPlan
from resist.planning.wire import FORMATS, FP32, Wire, as_wire, fragment_bytes
from resist.sync.transport import PACKET_BYTES

SEED = 0
WIRE = ("wire", "fragments", "delay")
OPTIONS = {
    "resist": ("optimizer_state", "min_depth", "capacities", "redraw_every", *WIRE),
    "local_sgd": ("optimizer_state", *WIRE),
    "diloco": WIRE,
}


def strategy_of(name: str, workers: int, local_steps: int, options: Mapping[str, str]) -> resist.Strategy:
    """Return the strategy of a method; UserError or ValueError if an option has a wrong value."""
    values: dict[str, object] = {key: value for key, value in options.items() if key not in WIRE}
    values |= {key: int(options[key]) for key in ("min_depth", "redraw_every") if key in options}
    if "capacities" in options:
        values["capacities"] = [int(capacity) for capacity in options["capacities"].split("/")]
    return build_strategy(name, workers, local_steps, **values)


def wire_of(options: Mapping[str, str]) -> Wire:
    """Return the wire formats of a method; UserError or ValueError if an option has a wrong value."""
    match options.get("wire", FP32).split("/"):
        case [name]:
            wire = as_wire(name)
        case [shared, blocks, state]:
            wire = Wire(shared, blocks, state)
        case _:
            raise ValueError(f"wire={options['wire']} must be one name, or three for shared part, blocks and state")
    fragments, delay = (int(options.get(key, getattr(wire, key))) for key in ("fragments", "delay"))
    return replace(wire, fragments=fragments, delay=delay)


def busy_steps(wire: Wire, local_steps: int) -> frozenset[int]:
    """Return the steps of a round, from 1, from the beginning of a fragment's mean to its end."""
    return frozenset(step for one in wire.times(local_steps) for step in range(one.begin, one.finish + 1))


class Own:
    """This package, used like in a training script."""

    def __init__(self, spec: str, build: Callable[[], nn.Module], strategy: resist.Strategy, wire: Wire) -> None:
        self.name = spec
        self.job = resist.Job(build, strategy, seed=SEED, batchnorm="batch", timeout_s=600.0, wire=wire, example=False)
        self.model = self.job.model
        self.optimizer = momentum_sgd(self.model)
        self._before = self.job.plan
        self.busy_steps = busy_steps(wire, strategy.local_steps)

    def step(self) -> None:
        self.job.step(self.optimizer)

    def synchronize(self) -> None:
        """End the round, with as many steps as remain of it."""
        self._before = self.job.plan
        if not self.optimizer.state and self.job.strategy.optimizer_state in ("travel", "average"):
            raise AssertionError("the optimizer has no state to send")
        for _ in range(self.job.steps_left):
            self.job.step(self.optimizer)

    def tidy(self) -> None:
        pass

    def counted_bytes(self) -> int:
        return sum(self.job.transport.take()["bytes"].values())  # type: ignore[attr-defined]

    def expected_bytes(self) -> int:
        """Return the bytes of the last round."""
        subnet = self.job.workers[0].subnet
        sizes = [subnet.shared.numel(), *(block // 4 for block in subnet.block_bytes)]
        return expected_bytes(self._before, self.job.plan, sizes, self.job.strategy, self.job.wire)


def expected_bytes(
    plan: RoundPlan, next_plan: RoundPlan, sizes: list[int], strategy: resist.Strategy, wire: Wire
) -> int:
    """Compute the payload bytes of a round from its plans alone, without `resist.planning.schedule`.

    An averaged block needs one message from each holder except its owner, then one to each next holder except the
    owner. The owner is a next holder too, if any holder is. The momentum goes along: with the block ("travel"), or
    everywhere ("average"); that of an outer optimizer only where a block is handed over.

    Args:
        plan: Plan of the round.
        next_plan: Plan of the next round.
        sizes: Numbers of the shared part, and of a block of each chain: all of them train, in single precision.
        strategy: The strategy.
        wire: Formats of what is sent.
    """
    workers, shared, blocks = strategy.workers, sizes[0], sizes[1:]
    moved, averaged = strategy.optimizer_state in ("travel", "average"), strategy.optimizer_state == "average"
    total = workers * (workers - 1) * PACKET_BYTES  # one text between each pair, to agree on the round
    everyone = shared
    if plan.held_by_all:
        everyone += sum(chain.num_blocks * numel for chain, numel in zip(plan.plans, blocks, strict=True))
    parts = [FORMATS[wire.shared].num_bytes(everyone)]
    if wire.fragments:
        parts = fragment_bytes(wire.shared, everyone, wire.fragments)
    parts += [FORMATS[wire.state].num_bytes(everyone)] if averaged else []
    # A mean, in a ring or in two halves of encoded pieces: each worker sends as much as it gets, rounded down.
    total += sum(workers * (2 * (workers - 1) * num_bytes // workers) for num_bytes in parts)
    for chain, block in plan.keys if not plan.held_by_all else ():
        holders, targets = set(plan.holders(chain, block)), set(next_plan.holders(chain, block))
        handed = len(targets) - bool(holders & targets)
        messages = len(holders) - 1 + handed
        weights, state = (FORMATS[format].num_bytes(blocks[chain]) for format in (wire.blocks, wire.state))
        total += messages * (weights + moved * state) + (handed * weights if strategy.outer is not None else 0)
    return total


def momentum_sgd(model: nn.Module) -> SGD:
    """Return SGD with momentum whose state exists, after one step with zero gradients (weights do not change)."""
    optimizer = SGD(model.parameters(), lr=0.03, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer
