"""The methods with which ResIST is compared, behind one interface: a network to train, and `synchronize`.

resist, local_sgd, diloco
                    this package (`Job`), with options after commas: resist,optimizer_state=travel,min_depth=8,wire=int8
                    (own.py)
flat                local SGD by hand: the parameters are views into one flat tensor, averaged by one all-reduce
averager            torch's PeriodicModelAverager, called after every step as its documentation shows
ddp                 torch's DistributedDataParallel: averages gradients in every step; nothing remains for the end
published           the pattern that the paper describes: every worker keeps the full network; for every block a new
                    process group of its holders and one reduce per tensor, then another group and one broadcast per
                    tensor; one all-reduce for each tensor of the shared part
published-kept      the same, but the groups are made once and kept: the remaining cost is the collective per tensor

The published pattern is optimized as far as it remains the same pattern: the owner of a block is a holder that also
holds it in the next round, if there is one; a block that stays is neither reduced nor broadcast; old groups are
destroyed outside the measured time. All methods draw the same plans and send the same tensors: parameters, without
BatchNorm statistics (the networks use those of each batch, as the authors' code does).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import own
import resist
from resist.blocks.chains import Chain, choose_chains
from resist.planning.plan import Plan
from resist.subnet.batchnorm import use_batch_statistics
from resist.subnet.seeded import build_seeded
from resist.sync.optimizer_state import OPTIMIZER_STATES

NAMES = (*own.OPTIONS, "flat", "averager", "ddp", "published", "published-kept")
Build = Callable[[], nn.Module]


class Method(Protocol):
    """A method to compare.

    Attributes:
        name: Name of the method.
        model: The network that this worker trains.
        optimizer: SGD with momentum, whose state already exists.
        busy_steps: Steps of a round, from 1, during which an exchange is under way.
    """

    name: str
    model: nn.Module
    optimizer: SGD
    busy_steps: frozenset[int]

    def step(self) -> None:
        """Count a training step that is not the last one of its round. An exchange may make progress meanwhile."""
        ...

    def synchronize(self) -> None:
        """End a round. Every worker must call this, and it waits for the others."""
        ...

    def tidy(self) -> None:
        """Clean up after a round, outside the measured time. Every worker must call this."""
        ...

    def expected_bytes(self) -> int | None:
        """Return the payload bytes of all workers in the last `synchronize`, by formula; None: no prediction."""
        ...

    def counted_bytes(self) -> int | None:
        """Return the same bytes as the method counted them; None: it does not count."""
        ...


def make(spec: str, build: Build, workers: int, local_steps: int) -> Method:
    """Make the method that `spec` describes. A process group must exist, with one process per worker."""
    name, options = _parse(spec)
    if name in own.OPTIONS:
        return own.Own(spec, build, own.strategy_of(name, workers, local_steps, options), own.wire_of(options))
    if name in ("published", "published-kept"):
        return Published(build, workers, keep_groups=name == "published-kept")
    if name == "averager":
        return Averager(build, local_steps)
    return Ddp(build) if name == "ddp" else Flat(build)


def check(specs: Sequence[str], build: Build, workers: int, local_steps: int) -> None:
    """Raise ValueError or UserError if `make` would not accept a spec, before any process is started."""
    with torch.device("meta"):
        chains = choose_chains(build())
    for spec in specs:
        name, options = _parse(spec)
        if name in own.OPTIONS:
            strategy = own.strategy_of(name, workers, local_steps, options)
            if strategy.optimizer_state not in OPTIMIZER_STATES:
                raise ValueError(f"method {spec!r}: optimizer_state is not one of {', '.join(OPTIMIZER_STATES)}")
            strategy.plan(chains, seed=own.SEED, round=0)
            own.wire_of(options).times(local_steps)


def _parse(spec: str) -> tuple[str, dict[str, str]]:
    name, *options = spec.split(",")
    given = dict(option.split("=", 1) for option in options if "=" in option)
    if name not in NAMES:
        raise ValueError(f"method {name!r} is not one of {', '.join(NAMES)}")
    allowed = own.OPTIONS.get(name, ())
    if len(given) != len(options) or not given.keys() <= set(allowed):
        raise ValueError(f"method {spec!r}: the options of {name} are {', '.join(allowed) or 'none'}")
    return name, given


class _Full:
    """Base of the methods whose workers hold the full network."""

    name: str
    busy_steps: frozenset[int] = frozenset()

    def __init__(self, build: Build) -> None:
        self.model: nn.Module = build_seeded(build, own.SEED)
        use_batch_statistics(self.model)
        self.workers = dist.get_world_size()

    def step(self) -> None:
        pass

    def tidy(self) -> None:
        pass

    def counted_bytes(self) -> None:
        return None

    def expected_bytes(self) -> int | None:
        """Return the bytes of a ring all-reduce of all parameters."""
        return 2 * (self.workers - 1) * sum(parameter.nbytes for parameter in self.model.parameters())


class Flat(_Full):
    name = "flat"

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        parameters = list(self.model.parameters())
        self.flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        for parameter, part in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view(parameter.shape)
        self.optimizer = own.momentum_sgd(self.model)

    @torch.no_grad()
    def synchronize(self) -> None:
        dist.all_reduce(self.flat)
        self.flat.div_(self.workers)


class Averager(_Full):
    name = "averager"

    def __init__(self, build: Build, local_steps: int) -> None:
        super().__init__(build)
        self.optimizer = own.momentum_sgd(self.model)
        self.period = local_steps
        self.averager = PeriodicModelAverager(period=local_steps)
        for parameter in self.model.parameters():  # it skips parameters without gradient
            parameter.grad = torch.zeros_like(parameter)

    def synchronize(self) -> None:
        """Make the calls of one round: one of them averages, the others only count."""
        for _ in range(self.period):
            self.averager.average_parameters(self.model.parameters())


class Ddp(_Full):
    name = "ddp"

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self.optimizer = own.momentum_sgd(self.model)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap `model` in DDP; its gradients are views, which saves a copy."""
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def synchronize(self) -> None:
        pass


class Published(_Full):
    def __init__(self, build: Build, workers: int, keep_groups: bool) -> None:
        super().__init__(build)
        self.name = "published-kept" if keep_groups else "published"
        self.optimizer = own.momentum_sgd(self.model)
        self.rank, self.round, self.keep = dist.get_rank(), 0, keep_groups
        self.strategy = resist.resist(workers)
        self.chains = choose_chains(self.model)
        self.groups: dict[object, object] = {}
        inside = {id(t) for chain in self.chains for b in range(chain.num_blocks) for t in self._tensors(chain, b)}
        self.others = [t for t in self.model.parameters() if id(t) not in inside]

    @torch.no_grad()
    def synchronize(self) -> None:
        for chain in self.chains:
            plan, following = self._plan(chain, self.round), self._plan(chain, self.round + 1)
            for block in range(chain.num_blocks):
                holders, targets = plan.holders(block), following.holders(block)
                owner = next((worker for worker in holders if worker in targets), holders[0])
                self._reduce(self._tensors(chain, block), owner, holders)
                self._broadcast(self._tensors(chain, block), owner, tuple(sorted({owner, *targets})))
        for tensor in self.others:
            dist.all_reduce(tensor)
            tensor.div_(self.workers)
        self.round += 1

    def tidy(self) -> None:
        if not self.keep:
            for group in self.groups.values():
                if group is not dist.GroupMember.NON_GROUP_MEMBER:
                    dist.destroy_process_group(group)  # type: ignore[arg-type]
            self.groups.clear()

    def expected_bytes(self) -> None:
        return None  # depends on how gloo reduces and broadcasts

    def _reduce(self, tensors: list[Tensor], owner: int, members: tuple[int, ...]) -> None:
        group = self._group(members)
        if self.rank in members and len(members) > 1:
            for tensor in tensors:
                dist.reduce(tensor, dst=owner, group=group)  # type: ignore[arg-type]
                if self.rank == owner:
                    tensor.div_(len(members))

    def _broadcast(self, tensors: list[Tensor], owner: int, members: tuple[int, ...]) -> None:
        group = self._group(members)
        if self.rank in members and len(members) > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=owner, group=group)  # type: ignore[arg-type]

    def _group(self, members: tuple[int, ...]) -> object:
        """Return a group of `members`; every process must call this, in the same order."""
        key: object = members if self.keep else len(self.groups)
        if key not in self.groups:
            self.groups[key] = dist.new_group(list(members))
        return self.groups[key]

    def _tensors(self, chain: Chain, block: int) -> list[Tensor]:
        return list(self.model.get_submodule(chain.block_name(block)).parameters())

    def _plan(self, chain: Chain, round: int) -> Plan:
        return self.strategy.assign(chain.num_blocks, chain=chain.name, seed=own.SEED, round=round)
