"""Every optimizer against an oracle that moves all of a block's state: the largest difference of a weight.

    python benchmarks/optimizers.py                # all of torch.optim and, where timm is installed, some of timm's
    python benchmarks/optimizers.py --only lamb    # those whose name contains this
    python benchmarks/optimizers.py --write        # benchmarks/results/optimizers.json, for docs/models.md

Two workers share no block. The oracle knows nothing of the package: in every round each worker gets a new, shallow
network and new optimizers, which begin with the whole state of each parameter, by its global name. What belongs to no
parameter (the options of a group) stays with the worker. Single precision, six rounds of three steps.
"""

import argparse
import copy
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import resist
from page_parts import table
from provenance import provenance
from resist.subnet.seeded import build_seeded

RESULTS = Path(__file__).parent / "results" / "optimizers.json"
BLOCKS, WIDTH, CLASSES = 6, 16, 5
WORKERS, ROUNDS, STEPS = 2, 6, 3
Make = Callable[[nn.Module], Sequence[Optimizer]]


class Block(nn.Module):
    """x + f(x), with matrices, vectors and a parameter without dimensions."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.norm, self.fc, self.gain = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(()))
        self.table = nn.Embedding(WIDTH, WIDTH, sparse=True) if sparse else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.gain * self.fc(F.relu(self.norm(x)))
        return x + y if self.table is None else x + y + self.table(x.argmax(-1))


class Net(nn.Module):
    """A stem, a chain of blocks, and a head. The final norm has the name of the blocks' norms."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(sparse) for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Case:
    """An optimizer to test.

    Attributes:
        name: Name in the table.
        make: Makes the optimizers of one worker.
        sparse: The blocks have tables with sparse gradients.
        optimizer_state: Policy for the state.
    """

    name: str
    make: Make
    sparse: bool = False
    optimizer_state: str = "travel"


def one(optimizer: Callable[..., Optimizer], **options: Any) -> Make:
    """Make a single optimizer for all parameters."""
    return lambda model: [optimizer(model.parameters(), **options)]


def matrices_and_rest(model: nn.Module) -> list[Optimizer]:
    """Muon takes matrices only: AdamW trains the rest."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01)]


def tables_and_rest(model: nn.Module) -> list[Optimizer]:
    """SparseAdam takes sparse gradients only: SGD trains the rest."""
    tables = [parameter for name, parameter in model.named_parameters() if "table" in name]
    rest = [parameter for name, parameter in model.named_parameters() if "table" not in name]
    return [torch.optim.SparseAdam(tables, lr=0.01), torch.optim.SGD(rest, lr=0.05)]


def timm_optimizer(name: str, **options: Any) -> Make:
    """Make an optimizer by timm's factory."""
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]

    return lambda model: [create_optimizer_v2(model, name, **{"lr": 0.01, **options})]


TORCH = [
    Case("Adadelta", one(torch.optim.Adadelta, lr=0.5)),
    Case("Adafactor", one(torch.optim.Adafactor, lr=0.01)),
    Case("Adagrad", one(torch.optim.Adagrad, lr=0.05)),
    Case("Adam", one(torch.optim.Adam, lr=0.01)),
    Case("Adamax", one(torch.optim.Adamax, lr=0.01)),
    Case("AdamW", one(torch.optim.AdamW, lr=0.01)),
    Case("AdamW, amsgrad", one(torch.optim.AdamW, lr=0.01, amsgrad=True)),
    Case("AdamW, fused", one(torch.optim.AdamW, lr=0.01, fused=True)),
    Case("ASGD", one(torch.optim.ASGD, lr=0.05, t0=5)),
    Case("LBFGS (reset)", one(torch.optim.LBFGS, lr=0.1, max_iter=3), optimizer_state="reset"),
    Case("Muon and AdamW", matrices_and_rest),
    Case("NAdam", one(torch.optim.NAdam, lr=0.01)),
    Case("RAdam", one(torch.optim.RAdam, lr=0.01)),
    Case("RMSprop", one(torch.optim.RMSprop, lr=0.01)),
    Case("RMSprop, centered, momentum", one(torch.optim.RMSprop, lr=0.01, centered=True, momentum=0.5)),
    Case("Rprop", one(torch.optim.Rprop, lr=0.001)),
    Case("SGD", one(torch.optim.SGD, lr=0.05)),
    Case("SGD, Nesterov", one(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)),
    Case("SparseAdam and SGD", tables_and_rest, sparse=True),
]
TIMM_NAMES = ("lamb", "adan", "lion", "adopt", "adafactorbv", "madgrad", "kron", "mars", "laprop", "novograd")


def cases() -> list[Case]:
    """List the cases: those of torch, and those of timm where it is installed."""
    timm = TIMM_NAMES if importlib.util.find_spec("timm") else ()
    return [*TORCH, *(Case(f"timm {name}", timm_optimizer(name)) for name in timm)]


def batch(worker: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw inputs (8, WIDTH) and labels (8,)."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return torch.randn(8, WIDTH, generator=generator), torch.randint(CLASSES, (8,), generator=generator)


def train_step(worker: int, step: int, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Take one step of all optimizers of a worker."""
    inputs, labels = batch(worker, step)

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    torch.manual_seed(1000 * worker + step)  # some optimizers draw random numbers
    for number, optimizer in enumerate(optimizers):
        if number == 0:
            closure()
        optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)  # type: ignore[arg-type]


@dataclass
class Oracle:
    """Nested loops and dictionaries by global name, without the package.

    Attributes:
        full: The full network; only its structure is used.
        make: Makes the optimizers of a network.
        resets: Every round begins with new optimizers.
        weights: Weights by global name.
        states: Worker -> global name -> state of the parameter. That of a block is with all of them.
        options: Worker -> options of the groups of each optimizer.
    """

    full: nn.Module
    make: Make
    resets: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    states: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    options: dict[int, list[Any]] = field(default_factory=dict[int, list[Any]])

    def __post_init__(self) -> None:
        self.weights = {name: value.detach().clone() for name, value in self.full.state_dict().items()}

    def round(self, blocks: Sequence[Sequence[int]], steps: Sequence[int]) -> None:
        """Train one round. `blocks` lists those of each worker."""
        ends: list[dict[str, Tensor]] = []
        for worker, held in enumerate(blocks):
            net = copy.deepcopy(self.full)
            net.load_state_dict(self.weights)
            children = net.get_submodule("blocks")
            assert isinstance(children, nn.ModuleList)
            net.add_module("blocks", nn.ModuleList(children[block] for block in held))
            names = {local: global_name(local, held) for local in net.state_dict()}
            optimizers = self.make(net)
            states = {} if self.resets else self.states.get(worker, {})
            self._fill(net, names, optimizers, states, self.options.get(worker))
            for step in steps:
                train_step(worker, step, net, optimizers)
            found = {
                names[local]: optimizer.state[parameter]
                for local, parameter in net.named_parameters()
                for optimizer in optimizers
                if parameter in optimizer.state
            }
            self.states[worker] = states | found
            self.options[worker] = [
                [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                for optimizer in optimizers
            ]
            ends.append({names[local]: value.detach() for local, value in net.state_dict().items()})
        for name in self.weights:
            held_values = [end[name] for end in ends if name in end]
            self.weights[name] = held_values[0].lerp(held_values[-1], 0.5) if len(held_values) > 1 else held_values[0]
        # What a block has goes with the block: from its only holder to all.
        for worker, held in enumerate(blocks):
            own = {n: s for n, s in self.states[worker].items() if block_of(n) in held}
            for other in self.states.values():
                other |= own

    def _fill(
        self,
        net: nn.Module,
        names: dict[str, str],
        optimizers: Sequence[Optimizer],
        states: dict[str, Any],
        options: list[Any] | None,
    ) -> None:
        for number, optimizer in enumerate(optimizers):
            trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            for local, parameter in net.named_parameters():
                if parameter in trained and names[local] in states:
                    optimizer.state[parameter] = copy.deepcopy(states[names[local]])
            for group, values in zip(optimizer.param_groups, options[number] if options else [], strict=False):
                group.update(copy.deepcopy(values))


def block_of(name: str) -> int | None:
    """Return the block that a global name belongs to, None outside the chain."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def global_name(local: str, held: Sequence[int]) -> str:
    """Return the global name of a tensor of a shallow network."""
    slot = block_of(local)
    return local if slot is None else ".".join(["blocks", str(held[slot]), *local.split(".")[2:]])


def difference(case: Case, rounds: int = ROUNDS) -> tuple[float, float]:
    """Train by the package and by the oracle.

    Args:
        case: The optimizer.
        rounds: Number of rounds.

    Returns:
        The largest difference of a weight, and the largest change of a weight by training.
    """
    strategy = resist.resist(WORKERS, STEPS, min_depth=0, optimizer_state=case.optimizer_state)
    job = resist.Job(lambda: Net(case.sparse), strategy, scale=1.0, seed=1)
    optimizers = [case.make(worker.model) for worker in job.workers]
    start = build_seeded(lambda: Net(case.sparse), 1)
    oracle = Oracle(copy.deepcopy(start), case.make, resets=case.optimizer_state == "reset")
    for round in range(rounds):
        (plan,), steps = job.plan_of(round).plans, range(round * STEPS, (round + 1) * STEPS)
        oracle.round(plan.blocks, steps)
        for step in steps:
            for worker, own in zip(job.workers, optimizers, strict=True):
                train_step(worker.index, step, worker.model, own)
            job.step(*(optimizer for own in optimizers for optimizer in own))
    full = job.full_model()
    assert full is not None
    found, before = full.state_dict(), start.state_dict()
    return (
        max(float((found[name] - value).abs().max()) for name, value in oracle.weights.items()),
        max(float((before[name] - value).abs().max()) for name, value in oracle.weights.items()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="optimizers whose name contains one of these")
    parser.add_argument("--write", action="store_true", help="write the results; `models.py --page` has them then")
    args = parser.parse_args()
    if args.write and args.only:
        parser.error("--write needs the results of all optimizers; leave out --only")
    torch.set_num_threads(1)
    chosen = [c for c in cases() if not args.only or any(text.lower() in c.name.lower() for text in args.only)]
    results = {case.name: difference(case) for case in chosen}
    if args.write:
        origin = provenance() | ({"timm": version("timm")} if importlib.util.find_spec("timm") else {})
        records = [{"name": name, "difference": d, "trained": by, **origin} for name, (d, by) in results.items()]
        RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        return
    lines = [(name, f"{apart:.1e}", f"{by:.1e}") for name, (apart, by) in results.items()]
    print(table(("optimizer", "largest difference", "largest change by training"), lines))


if __name__ == "__main__":
    main()
