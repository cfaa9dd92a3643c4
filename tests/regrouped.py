"""Jobs whose members come and go, in threads, with everything that a round began with for comparison."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resist.errors import WorkerLostError
from resist.job import Job
from resist.planning.strategy import Strategy
from resist.sync import worker as worker_module
from resist.sync.local import Unconnected
from resist.sync.worker import Worker
from threaded import Died, Threaded, Wires, in_threads

BLOCKS, WIDTH, STEPS = 6, 4, 2


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x + self.linear(torch.relu(self.norm(x)))


class Stem(nn.Linear):
    """Counts in the shared part, each worker for itself."""

    def __init__(self) -> None:
        super().__init__(3, WIDTH)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def _built() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = nn.Sequential(*(Residual() for _ in range(BLOCKS)))
        return nn.Sequential(Stem(), nn.BatchNorm1d(WIDTH), blocks, nn.Linear(WIDTH, 3))


NETWORK = _built()


def network() -> nn.Module:
    """A copy, since threads must not draw from one generator."""
    return copy.deepcopy(NETWORK)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


State = dict[str, Tensor]


class Member:
    """One process: its job, optimizers and averages."""

    def __init__(self, cluster: "Cluster", transport: Any) -> None:
        self.cluster = cluster
        self.job = Job(network, cluster.strategy, transport=transport, **cluster.options)
        self.optimizers = [cluster.optimizer(worker.model) for worker in self.job.workers]
        self.job.attach(*self.optimizers)
        self.averages: list[AveragedModel] = []
        if cluster.averaged:
            update = get_ema_multi_avg_fn(0.5)
            self.averages = [AveragedModel(worker.model, multi_avg_fn=update) for worker in self.job.workers]
            self.job.follow(*self.averages)
        self.record()

    def step(self) -> None:
        """A step of random gradients towards zero."""
        for worker, optimizer in zip(self.job.workers, self.optimizers, strict=True):
            random = torch.Generator().manual_seed(1000 * worker.index + self.job.step_index)
            for parameter in worker.model.parameters():
                parameter.grad = parameter.detach() + torch.randn(parameter.shape, generator=random)
            for name, buffer in worker.model.named_buffers():
                if "running" in name:
                    buffer.add_(0.01 * (worker.index + 1))
                if "calls" in name or "seen" in name:
                    buffer.add_(1)
            optimizer.step()
        for worker, average in zip(self.job.workers, self.averages, strict=False):
            average.update_parameters(worker.model)
        if self.job.step(*self.optimizers):
            self.record()

    def train(self, steps: int) -> None:
        try:
            for _ in range(steps):
                self.step()
        except (WorkerLostError, Died):
            self.record()
            raise

    def record(self) -> None:
        """Note what a round begins with, for all to see."""
        job = self.job
        if not job.torn and job.steps_in_round == 0 and job.generation >= 0:
            for worker in job.workers:
                own = self.cluster.history.setdefault((job.generation, job.round), {})
                own.setdefault(worker.index, self.state(worker))

    def state(self, worker: Worker, *, averaged: bool = False) -> State:
        subnet = worker.average if averaged else worker.subnet
        assert subnet is not None
        flats = worker.agreed if not averaged and not self.job.steps_in_round else subnet.flats
        state = subnet.state(self.job.plan.held(worker.index), flats)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def regroup(self, transport: Any, **options: Any) -> Any:
        found = self.job.regroup(transport, **options)
        self.record()
        return found


class Cluster:
    """The processes of a job."""

    def __init__(
        self,
        strategy: Strategy,
        hosted: Sequence[Sequence[int]] = (),
        optimizer: Callable[[nn.Module], Optimizer] = sgd,
        *,
        averaged: bool = False,
        **options: Any,
    ) -> None:
        self.strategy, self.optimizer, self.averaged = strategy, optimizer, averaged
        self.options: dict[str, Any] = {
            "batchnorm": "average",
            "example": False,
            "replicate": True,
            "elastic": True,
            **options,
        }
        self.history: dict[tuple[int, int], dict[int, State]] = {}
        # It lists all objects of the process: a tuple that another thread is building must not get another reference.
        worker_module.check_alone = lambda *_: None
        self.wires = Wires(hosted or [(worker,) for worker in range(strategy.workers)])
        makers = [lambda r=rank: Member(self, Threaded(self.wires, r)) for rank in range(len(self.wires.hosted))]
        self.members: list[Member] = in_threads(makers, self.wires)
        self.wires.events = [0] * len(self.members)

    def train(self, steps: int, deaths: dict[int, int] | None = None) -> list[Any]:
        """Train, and remove those that died. Returns what became of the others: None, or WorkerLostError."""
        self.wires.deaths, self.wires.events = deaths or {}, [0] * len(self.members)
        return self._run([lambda m=member: m.train(steps) for member in self.members])

    def _run(self, actions: Sequence[Callable[[], Any]]) -> list[Any]:
        outcomes = in_threads(actions, self.wires)
        alive = [not isinstance(outcome, Died) for outcome in outcomes]
        self.members = [member for member, there in zip(self.members, alive, strict=True) if there]
        return [outcome for outcome, there in zip(outcomes, alive, strict=True) if there]

    def join(self, processes: int = 1) -> None:
        """Processes that join at the next `regroup`."""
        self.members += [Member(self, Unconnected(self.strategy.workers)) for _ in range(processes)]

    def regroup(
        self, deaths: dict[int, int] | None = None, order: Sequence[int] | None = None, **options: Any
    ) -> list[Any]:
        """Regroup all members. Returns what became of those that are still there."""
        self.members = [self.members[number] for number in order or range(len(self.members))]
        counts = [len(member.job.workers) for member in self.members]
        firsts = [sum(counts[:rank]) for rank in range(len(counts))]
        hosted = [range(first, first + count) for first, count in zip(firsts, counts, strict=True)]
        self.wires = Wires(hosted, deaths)
        return self._run(
            [
                lambda m=member, r=rank: m.regroup(Threaded(self.wires, r), **options)
                for rank, member in enumerate(self.members)
            ]
        )

    def states(self, *, averaged: bool = False) -> dict[int, State]:
        """What each worker has."""
        return {w.index: m.state(w, averaged=averaged) for m in self.members for w in m.job.workers}

    def full(self) -> State:
        """The network of the present point; checks that all holders have the same bits, and that it is complete."""
        return merged(list(self.states().values()))


def merged(states: Sequence[State], *, complete: bool = True) -> State:
    """The network of several workers that agree."""
    full: State = {}
    for state in states:
        for name, tensor in state.items():
            assert torch.equal(full.setdefault(name, tensor), tensor), name
    expected = {name for name, tensor in NETWORK.state_dict().items() if tensor.is_floating_point()}
    assert full.keys() == expected or not complete
    return full


def close(one: State, two: State, tolerance: float = 1e-6) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
