"""Processes that are threads: a transport for jobs of several "processes" in one, which can be lost at any point.

Every call of the transport and every `finish` is an *event*. A process that dies at one of them is gone for the
others, as is one that has noticed a loss and left. What an exchange under way has written is worthless: NaN.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resist.errors import WorkerLostError
from resist.sync.averaging import mean_into
from resist.sync.transport import Handle, Move

TIMEOUT_S = 60.0


class Died(BaseException):
    """The process ends here."""


class Wires:
    """What connects processes: each posts a value for each call, and waits for those of others.

    hosted: the workers of each process.
    deaths: process -> number of the event at which it dies, from 1.
    """

    def __init__(self, hosted: Sequence[Sequence[int]], deaths: dict[int, int] | None = None) -> None:
        self.hosted, self.deaths = [tuple(own) for own in hosted], deaths or {}
        self.events = [0] * len(hosted)
        self._posts: dict[tuple[int, int], Any] = {}
        self._gone: set[int] = set()
        self._changed = threading.Condition()

    def event(self, rank: int) -> None:
        self.events[rank] += 1
        if self.events[rank] == self.deaths.get(rank):
            self.leave(rank)
            raise Died

    def leave(self, rank: int) -> None:
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()

    def post(self, call: int, rank: int, value: Any) -> None:
        with self._changed:
            self._posts[call, rank] = value
            self._changed.notify_all()

    def wait(self, call: int, ranks: Sequence[int]) -> list[Any]:
        with self._changed:
            for rank in ranks:
                there = self._changed.wait_for(lambda r=rank: (call, r) in self._posts or r in self._gone, TIMEOUT_S)
                assert there, f"nobody waits longer: call {call}, process {rank}"
                if (call, rank) not in self._posts:
                    raise WorkerLostError(f"process {rank} is gone")
            return [self._posts[call, rank] for rank in ranks]


class Finish:
    def __init__(self, transport: "Threaded", action: Callable[[], list[Tensor | None]]) -> None:
        self._transport, self._action = transport, action

    def finish(self) -> list[Tensor | None]:
        self._transport.wires.event(self._transport.rank)
        with torch.no_grad():
            return self._action()


class Threaded:
    def __init__(self, wires: Wires, rank: int) -> None:
        self.wires, self.rank, self.hosted = wires, rank, wires.hosted[rank]
        self.num_processes, self.num_workers = len(wires.hosted), sum(map(len, wires.hosted))
        self._calls = 0

    def process_of(self, worker: int) -> int:
        return next(rank for rank, own in enumerate(self.wires.hosted) if worker in own)

    def _begin(self, value: Any) -> int:
        self.wires.event(self.rank)
        self._calls += 1
        self.wires.post(self._calls, self.rank, value)
        return self._calls

    @torch.no_grad()
    def transfer(self, moves: Sequence[Move]) -> Handle:
        sent = {n: m.outgoing.clone() for n, m in enumerate(moves) if m.outgoing is not None}
        for n, m in enumerate(moves):
            crosses = self.process_of(m.source) != self.process_of(m.target)
            assert m.num_bytes == (sent[n].nbytes if n in sent else m.num_bytes)
            if m.incoming is not None and crosses:
                m.incoming.copy_(_worthless(m.incoming))
        call = self._begin(sent)

        def finish() -> list[Tensor | None]:
            arrived: list[Tensor | None] = []
            for n, m in enumerate(moves):
                if m.target not in self.hosted:
                    arrived.append(None)
                elif m.incoming is None:
                    arrived.append(m.outgoing)
                else:
                    m.incoming.copy_(self.wires.wait(call, [self.process_of(m.source)])[0][n])
                    arrived.append(m.incoming)
            return arrived

        return Finish(self, finish)

    def _everyone(self, call: int) -> list[Any]:
        return self.wires.wait(call, range(self.num_processes))

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor], traffic_kind: str, scale: float = 1.0) -> Handle:
        call = self._begin([tensor.clone() for tensor in tensors])
        for tensor in tensors:
            tensor.copy_(_worthless(tensor))

        def finish() -> list[Tensor | None]:
            everyone = [tensor.clone() for own in self._everyone(call) for tensor in own]
            mean_into(everyone[0], everyone[1:], scale)
            for tensor in tensors:
                tensor.copy_(everyone[0])
            return []

        return Finish(self, finish)

    def scatter(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        call = self._begin([tensor.clone() for tensor in sent])

        def finish() -> list[Tensor | None]:
            rows = torch.stack([tensor for own in self._everyone(call) for tensor in own])
            pieces = torch.split(rows, list(sizes), 1)
            return [pieces[worker].clone() for worker in self.hosted]

        return Finish(self, finish)

    def gather(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        call = self._begin([tensor.clone() for tensor in sent])
        return Finish(self, lambda: [torch.cat([tensor for own in self._everyone(call) for tensor in own])])

    def average_gradients(self, model: nn.Module, count: Callable[[int], None]) -> nn.Module:
        return model

    def all_gather_text(self, text: str) -> list[str]:
        return self._everyone(self._begin(text))

    def close(self) -> None:
        self.wires.leave(self.rank)


def _worthless(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 99)


_generator = threading.RLock()


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with _generator:
            return function(*args, **kwargs)

    return locked


# torch copies the state of its generator with the generator's mutex, and without Python's lock for a moment. A second
# thread that waits for the mutex with Python's lock then stops the whole process: so one thread at a time.
for _name in ("get_rng_state", "set_rng_state", "manual_seed"):
    for _module in (torch, torch.random):
        setattr(_module, _name, _one_at_a_time(getattr(_module, _name)))


def in_threads(actions: Sequence[Callable[[], Any]], wires: Wires) -> list[Any]:
    """Run an action in each process. Returns its value, or the exception with which it has left."""
    outcomes: list[Any] = [None] * len(actions)

    def run(rank: int) -> None:
        try:
            outcomes[rank] = actions[rank]()
        except BaseException as error:
            outcomes[rank] = error
            wires.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT_S)
        assert not thread.is_alive(), "a process hangs"
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Died | WorkerLostError | ValueError):
            raise outcome
    return outcomes
