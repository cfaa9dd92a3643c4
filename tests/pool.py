"""A pool of processes for tests. A server imports torch once a session, and the processes are forked from it. Each call
joins some of them into a new gloo group, so that no call depends on an earlier one.

A process whose function raises sends its traceback and ends, as a process of a real job would: its peers see its
connections close. It is replaced at the next call. A call that takes longer than its timeout kills its processes.
"""

import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Once for all processes. Every optimizer imports torch._dynamo, which takes as long as torch.
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "pytest", "hypothesis", "sklearn.datasets"]
PRELOADED += ["resist.job", "resist.training.train", "resist.runs.replicas", "resist.cli.train"]


@dataclass
class Outcome:
    """The result of a call in one process: a value, or the text of its exception ("" if it was killed).

    connected: False if the processes could not be connected, so that the function was not called.
    """

    value: Any = None
    error: str | None = None
    connected: bool = True


class Pool:
    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._members: list[tuple[BaseProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory()
        self._calls = 0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        for number in range(len(self._members)):
            self._end(number)
        self._folder.cleanup()

    def run(
        self, processes: int, function: Callable[..., Any], *arguments: object, timeout_s: float = 120
    ) -> list[Any]:
        """Return the value of `function(*arguments)` in each process. Fails with the tracebacks of all that raised."""
        outcomes = self.outcomes(processes, function, *arguments, timeout_s=timeout_s)
        errors = [f"process {rank}: {o.error or 'killed'}" for rank, o in enumerate(outcomes) if o.error is not None]
        assert not errors, "\n".join(errors)
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self, processes: int, function: Callable[..., Any], *arguments: object, timeout_s: float = 120,
        again: bool = True,
    ) -> list[Outcome]:  # fmt: skip
        """Return the outcome of `function(*arguments)`, which must be importable, in each of `processes` processes.

        again: Where gloo cannot connect them, which it rarely fails to do, try it once more with new processes.
        """
        self._fill(processes)
        self._calls += 1
        store = Path(self._folder.name) / f"store{self._calls}"
        work = pickle.dumps((function, arguments))
        for rank in range(processes):
            self._members[rank][1].send((sys.path, work, str(store), rank, processes))
        ended: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout_s
        while len(ended) < processes:
            waiting = {self._members[r][1]: r for r in range(processes) if r not in ended}
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                for rank in range(processes):
                    self._end(rank)
                raise TimeoutError(f"processes {list(waiting.values())} did not answer within {timeout_s} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    ended[waiting[connection]] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    ended[waiting[connection]] = Outcome(error="")
            if again and not all(outcome.connected for outcome in ended.values()):
                for rank in range(processes):
                    self._end(rank)
                return self.outcomes(processes, function, *arguments, timeout_s=timeout_s, again=False)
        for rank, outcome in ended.items():
            if outcome.error is not None:
                self._end(rank)
        return [ended[rank] for rank in range(processes)]

    def _fill(self, processes: int) -> None:
        for number in range(processes):
            if number < len(self._members) and self._members[number][0].is_alive():
                continue
            connection, served = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(served,), daemon=True)
            process.start()
            served.close()
            self._members[number : number + 1] = [(process, connection)]

    def _end(self, number: int) -> None:
        process, connection = self._members[number]
        connection.close()
        process.kill()
        process.join()


def seed_everything() -> None:
    """Seed the global generators: every test and every call draws the same numbers, whatever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def by_day_with_one(cases: Iterable[Any], numbers: Sequence[int]) -> list[Any]:
    """Parameters of a test: each case with one of the numbers of processes in turn, at night with all."""
    import pytest

    return [
        pytest.param(case, number, marks=() if place % len(numbers) == turn else pytest.mark.nightly)
        for place, case in enumerate(cases)
        for turn, number in enumerate(numbers)
    ]


def _serve(connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            sys.path[:], work, store, rank, processes = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=timedelta(seconds=50)
            )
            dist.barrier()  # no process begins where another one has failed to connect: all are called again then
        except RuntimeError:
            connection.send_bytes(pickle.dumps(Outcome(error=traceback.format_exc(), connected=False)))
            os._exit(1)
        try:
            function, arguments = pickle.loads(work)
            seed_everything()
            answer = pickle.dumps(Outcome(value=function(*arguments)))
            if dist.is_initialized():
                dist.barrier()  # a process must not leave while another one still needs it
                dist.destroy_process_group()
        except BaseException:
            connection.send_bytes(pickle.dumps(Outcome(error=traceback.format_exc())))
            os._exit(1)
        connection.send_bytes(answer)
