"""Several processes: the weights of one process, equal accounts in all of them, and an error if one is lost."""

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pool import Pool, by_day_with_one
from resist.errors import AgreedError, UserError, WorkerLostError
from resist.planning.schedule import allreduce_bytes
from resist.planning.strategy import Strategy, local_sgd, resist, switch
from resist.sync.agreement import check_agreement
from resist.sync.distributed import PIECE, Distributed, connect
from resist.sync.local import Local
from resist.sync.traffic import CountingTransport
from resist.sync.transport import PACKET_BYTES
from support import adamw, floats, local_step, make, sgd, states, train, weights

pytestmark = pytest.mark.slow

# Worker counts of two sum in one order only; others differ by rounding, which a few rounds of training hardly enlarge.
TOLERANCE = 1e-10


@dataclass
class Case:
    """A training run, in a form that can be sent to a process."""

    capacities: tuple[int, ...]
    policy: str = "travel"
    adam: bool = False
    warm_up: bool = False
    steps: int = 7
    channels_last: bool = False
    lr: float | None = None

    @property
    def workers(self) -> int:
        return len(self.capacities)

    def strategy(self) -> Strategy:
        strategy = resist(self.workers, 2, capacities=self.capacities, optimizer_state=self.policy)
        first = local_sgd(self.workers, 2, optimizer_state=self.policy)
        return switch(first, strategy, at_round=2) if self.warm_up else strategy


@dataclass
class Result:
    """The result of a case in one process.

    Attributes:
        full: The full network, in the process of worker 0.
        flats: The flat tensor of each hosted worker.
        momenta: The momentum of each hosted worker by global dotted name.
        ledgers: The traffic accounts of each round, and of the assembly of the full network.
    """

    full: dict[str, Tensor] | None
    flats: dict[int, Tensor]
    momenta: dict[int, dict[str, Tensor]]
    ledgers: list[dict[str, Any]]


def run_case(case: Case, alone: bool = False) -> Result:
    """Train `case` in this process and its peers, or `alone`."""
    transport = Local(case.workers) if alone else None
    job, optimizers = make(
        case.strategy(), adamw if case.adam else sgd, transport=transport, seed=2, channels_last=case.channels_last
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if case.lr is None else case.lr
    ledgers = []
    for _ in range(case.steps):
        local_step(job, optimizers)
        if job.step(*optimizers):
            ledgers.append(job.transport.take())
    full = job.full_model()
    ledgers.append(job.transport.take())
    state_name = "exp_avg" if case.adam else "momentum_buffer"
    return Result(
        None if full is None else floats(full),
        {worker.index: worker.subnet.flat.clone() for worker in job.workers},
        {w.index: s for w, s in zip(job.workers, states(job, optimizers, state_name), strict=True)},
        ledgers,
    )


def merged(results: list[Result]) -> Result:
    flats = {worker: flat for result in results for worker, flat in result.flats.items()}
    momenta = {worker: state for result in results for worker, state in result.momenta.items()}
    (full,) = [result.full for result in results if result.full is not None]
    return Result(full, flats, momenta, results[0].ledgers)


CASES = [
    Case((2, 2, 2, 2)),
    Case((2, 2, 2, 2), policy="average"),
    Case((4, 3, 1, 2), policy="travel"),
    Case((4, 3, 1, 2), policy="average", adam=True, channels_last=True),
    Case((3, 2, 1, 2), policy="keep", warm_up=True, steps=9),
    Case((6, 6, 6, 6), policy="average"),
]


@pytest.mark.parametrize(("case", "processes"), by_day_with_one(CASES, (2, 4)), ids=repr)
def test_the_number_of_processes_does_not_matter(pool: Pool, case: Case, processes: int) -> None:
    """1, 2 and 4 processes that host 4 workers: equal weights, statistics and momentum, to 1e-10 in double precision.

    The accounts of all processes are equal, and those of different numbers of processes too, except for wire bytes.
    """
    alone, results = run_case(case, alone=True), pool.run(processes, run_case, case)
    check_equal(alone, merged(results))
    for result in results:
        for ledger, expected, first in zip(result.ledgers, alone.ledgers, results[0].ledgers, strict=True):
            assert without_times(ledger) == without_times(first)
            for key in ("bytes", "messages") if "evaluate" in ledger["bytes"] else ("bytes", "messages", "pairs"):
                assert without_control(ledger[key]) == without_control(expected[key])


def without_times(ledger: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in ledger.items() if key != "wait_s"}


def without_control(counted: Any) -> Any:
    """Texts are sent between processes, so only they depend on the number of processes."""
    return {name: n for name, n in counted.items() if name != "control"} if isinstance(counted, dict) else counted


def check_equal(expected: Result, actual: Result) -> None:
    assert expected.full is not None
    assert actual.full is not None
    assert expected.flats.keys() == actual.flats.keys()
    for worker, flat in expected.flats.items():
        torch.testing.assert_close(actual.flats[worker], flat, rtol=TOLERANCE, atol=TOLERANCE)
        assert expected.momenta[worker].keys() == actual.momenta[worker].keys()
        for name, value in expected.momenta[worker].items():
            torch.testing.assert_close(actual.momenta[worker][name], value, rtol=TOLERANCE, atol=TOLERANCE)
    for name, value in expected.full.items():
        torch.testing.assert_close(actual.full[name], value, rtol=TOLERANCE, atol=TOLERANCE)


def test_three_workers_in_two_processes(pool: Pool) -> None:
    """One process hosts one worker, the other one two: the mean has equal weights for workers, not for processes."""
    case = Case((3, 2, 2), policy="average")
    check_equal(run_case(case, alone=True), merged(pool.run(2, run_case, case)))


def test_shared_parts_have_the_same_bits(pool: Pool) -> None:
    """All workers of all processes end a round with the same shared part, bit for bit."""
    for processes in (2, 4):
        results = merged(pool.run(processes, shared_parts, Case((2, 2, 2, 2), steps=4)))
        assert all(torch.equal(flat, results.flats[0]) for flat in results.flats.values())


def shared_parts(case: Case) -> Result:
    job, optimizers = make(case.strategy(), seed=2)
    train(job, optimizers, case.steps)
    shared = {worker.index: worker.subnet.shared.clone() for worker in job.workers}
    return Result({} if 0 in job.transport.hosted else None, shared, {}, [])


def test_a_large_mean_goes_in_pieces(pool: Pool) -> None:
    """Two all-reduces at a time, of nearly equal pieces, whatever the processes host."""
    numel = PIECE // 2 + 1  # two pieces of float32
    expected = torch.stack([vector(numel, worker) for worker in range(3)]).mean(0)
    for processes, scale in ((3, 1.0), (2, 0.5)):
        outcomes = pool.run(processes, large_mean, numel, scale)
        assert [sizes for _, sizes in outcomes] == [[numel // 2 + 1, numel // 2]] * processes
        for means, _ in outcomes:
            for mean in means:
                torch.testing.assert_close(mean, expected * scale, rtol=1e-6, atol=1e-6)
                assert torch.equal(mean, outcomes[0][0][0])


def vector(numel: int, worker: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(worker))


def large_mean(numel: int, scale: float) -> tuple[list[Tensor], list[int]]:
    """The mean over three workers here, and the size of each all-reduce."""
    transport, sizes = Distributed(3), list[int]()
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    tensors = [vector(numel, worker) for worker in transport.hosted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        transport.mean(tensors, "shared", scale).finish()
    transport.close()
    return tensors, sizes


def test_without_learning_nothing_changes_by_a_bit(pool: Pool) -> None:
    """Parameters after 4 rounds at learning rate 0 are the initial ones, bit for bit."""
    case = Case((4, 3, 1, 2), lr=0.0, steps=8)
    start = weights(make(case.strategy(), seed=2, transport=Local(4))[0])
    for processes in (2, 4):
        full = merged(pool.run(processes, run_case, case)).full
        assert full is not None
        assert all(torch.equal(value, start[name]) for name, value in full.items() if "running" not in name)


@pytest.mark.parametrize("processes", [2, 4])
def test_bytes_on_the_wire(pool: Pool, processes: int) -> None:
    """Messages between workers of one process are not counted; the mean counts as one between processes."""
    case = Case((4, 3, 1, 2), policy="average")
    job, _ = make(case.strategy(), seed=2, transport=Local(4))
    subnet, process_of = job.workers[0].subnet, [worker * processes // 4 for worker in range(4)]
    for result in pool.run(processes, run_case, case):
        for ledger in result.ledgers[:-1]:
            shared = processes * allreduce_bytes(subnet.layout.shared.numel * 8, processes)
            crossing = sum(n for source, target, n in ledger["pairs"] if process_of[source] != process_of[target])
            assert ledger["wire_bytes"]["shared"] == shared
            blocks_and_state = ledger["wire_bytes"]["blocks"] + ledger["wire_bytes"]["state"]
            assert blocks_and_state == crossing + shared  # the momentum of the shared part is averaged too


def mixed_up(options: list[dict[str, Any]]) -> str:
    rank = torch.distributed.get_rank()
    arguments = {"strategy": resist(2, 2), **options[min(rank, len(options) - 1)]}
    try:
        make(arguments.pop("strategy"), **arguments)
    except UserError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"seed": 1}, "seed=1"),
        ({"batchnorm": "batch"}, "batchnorm=batch"),
        ({"channels_last": True}, "channels_last=True"),
        ({"chains": ("layer3:1-4",)}, "chains=['layer3:1-4']"),
    ],
)
def test_different_arguments_are_named(pool: Pool, options: dict[str, Any], key: str) -> None:
    for message in pool.run(2, mixed_up, [{}, options]):
        assert message.startswith(f"process 1 was started with `{key}`, process 0 with `")
        assert message.endswith("start all of them with the same arguments")
        assert "\n" not in message


def different_strategies(number: int) -> str:
    first = [
        resist(2, 2),
        resist(2, 2),
        resist(2, 2),
        switch(local_sgd(2), resist(2), at_round=1),
        switch(local_sgd(2), resist(2), at_round=1),
        resist(2, 2),
    ]
    other = [
        resist(2, 3),
        resist(2, 2, min_depth=5),
        resist(2, 2, optimizer_state="reset"),
        switch(local_sgd(2), resist(2, min_depth=5), at_round=1),
        switch(local_sgd(2), resist(2), at_round=2),
        resist(2, 2, redraw_every=2),
    ]
    return mixed_up([{"strategy": first[number]}, {"strategy": other[number]}])


def test_different_strategies_are_named(pool: Pool) -> None:
    keys = ["`local_steps", "`capacities", "`optimizer_state", "`capacities", "`at_round", "rules of the plans"]
    for number, key in enumerate(keys):
        assert all(f"process 1 was started with {key}=" in text for text in pool.run(2, different_strategies, number))


def gather(texts: list[str]) -> tuple[list[str], int, str]:
    ledger = CountingTransport(Distributed(2, timeout_s=20))
    rank = torch.distributed.get_rank()
    gathered = ledger.all_gather_text(texts[rank])
    try:
        check_agreement(ledger, {"a": 1, **({"b": 2} if rank else {})})
    except UserError as error:
        return gathered, ledger.bytes["control"], str(error)
    raise AssertionError("the two differ")


def test_texts_of_different_lengths(pool: Pool) -> None:
    """Every process gets all of them; a key that only one process has is reported too."""
    for gathered, num_bytes, message in pool.run(2, gather, ["grüße", "x" * 3000]):
        assert gathered == ["grüße", "x" * 3000]
        assert num_bytes == 2 * (PACKET_BYTES + 3000) + 2 * PACKET_BYTES
        assert message.startswith("process 1 was started with `b=2`, process 0 with `b=None`")


def more_processes_than_workers() -> str:
    with pytest.raises(UserError) as raised:
        make(resist(1))
    return str(raised.value)


def test_more_processes_than_workers(pool: Pool) -> None:
    expected = "2 processes for 1 workers; start at most one process for each worker"
    assert pool.run(2, more_processes_than_workers) == [expected] * 2


def lose(how: str, at: str, folder: Path) -> tuple[str, float]:
    """Lose process 1 in its second round. Returns the error of the others, and the seconds until they raise it.

    A process that stalls does so until all others have left a file in `folder`.
    """
    rank = torch.distributed.get_rank()
    size = torch.distributed.get_world_size()
    job, optimizers = make(resist(size, 2), timeout_s=6.0 if how == "stall" else 100.0)
    train(job, optimizers, 3)
    if rank == 1:
        local_step(job, optimizers)
        if how == "raise":
            raise RuntimeError("the second worker has had enough")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while len(list(folder.iterdir())) < size - 1:
            time.sleep(0.1)
        os._exit(1)
    start = time.monotonic()
    try:
        if at == "step":
            train(job, optimizers, 1)
        else:
            job.full_model()
    except WorkerLostError as error:
        text, seconds = str(error), time.monotonic() - start
        (folder / str(rank)).touch()
        torch.distributed.destroy_process_group()
        return text, seconds
    raise AssertionError("the loss of a worker went unnoticed")


@pytest.mark.parametrize(
    ("how", "at", "processes"),
    [("raise", "step", 2), ("kill", "step", 4), ("kill", "step", 2), ("stall", "step", 2), ("kill", "full_model", 2)],
)
def test_the_loss_of_a_worker_ends_the_others(pool: Pool, tmp_path: Path, how: str, at: str, processes: int) -> None:
    """At once if its connections close, long before the timeout; after it otherwise. The others never hang."""
    outcomes = pool.outcomes(processes, lose, how, at, tmp_path, timeout_s=120)
    lost = outcomes.pop(1)
    assert lost.error is not None
    assert how != "raise" or "RuntimeError: the second worker has had enough" in lost.error
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, outcome.error
        text, seconds = outcome.value
        assert text.startswith(f"process {rank if rank == 0 else rank + 1} (worker ")
        assert text.endswith("process 1 (worker 1) did not come in time: it hangs, or needs a longer `timeout_s`") or (
            how != "stall" and text.endswith("no answer from process 1 (worker 1)")
        )
        assert "lost contact while" in text
        assert "\n" not in text
        assert seconds < 50


def boom() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("a text to be found")


def sleep() -> None:
    time.sleep(600)


def test_the_pool_itself(pool: Pool) -> None:
    """An exception arrives with its traceback, a hang ends with the timeout, and the pool works afterwards."""
    with pytest.raises(AssertionError, match=r"(?s)process 1: Traceback.*in boom.*ValueError: a text to be found"):
        pool.run(2, boom)
    with pytest.raises(TimeoutError, match="did not answer within 1 s"):
        pool.run(2, sleep, timeout_s=1)
    assert pool.run(2, os.getpid)[0] != os.getpid()


def close_in_order(order: list[int], own_group: bool) -> bool:
    """Make two jobs, close them in this order, and train the other one in between. Returns if a group is left."""
    if own_group:
        join_by_environment()
    jobs = [make(resist(2, 1, optimizer_state="reset"), seed=seed) for seed in range(2)]
    for job, optimizers in jobs:
        train(job, optimizers, 2)
    first, second = (jobs[number] for number in order)
    first[0].close()
    train(*second, 2)
    second[0].full_model()
    first[0].close()  # once more does no harm
    with pytest.raises(UserError, match="this job is closed, and its connections with it"):
        train(*first, 1)
    second[0].close()
    left = torch.distributed.is_initialized()
    if left:
        torch.distributed.barrier()
    again, optimizers = make(resist(2, 1))  # and a third one afterwards
    train(again, optimizers, 2)
    again.close()
    return left


def join_by_environment() -> None:
    """Leave the group of the pool, and prepare the environment of torchrun."""
    rank = torch.distributed.get_rank()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = [listener.getsockname()[1]]
    torch.distributed.broadcast_object_list(port)
    torch.distributed.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port[0])}


def meet_without_the_third() -> tuple[str, float]:
    join_by_environment()
    os.environ["WORLD_SIZE"], start = "3", time.monotonic()
    with pytest.raises(AgreedError) as raised:
        connect(3, "cpu", 4.0)
    return str(raised.value), time.monotonic() - start


def test_a_process_that_never_arrives_is_named_within_the_timeout() -> None:
    with Pool() as pool:
        for text, seconds in pool.run(2, meet_without_the_third):
            assert text.startswith("process 2 (worker 2) has not come within 4 s; there are 0, 1 on ")
            assert seconds < 20


ORDERS = [[0, 1], pytest.param([1, 0], marks=pytest.mark.nightly)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_two_jobs_and_the_group_of_the_caller(pool: Pool, order: list[int]) -> None:
    assert pool.run(2, close_in_order, order, False) == [True, True]


@pytest.mark.parametrize("order", ORDERS[::-1], ids=str)
def test_two_jobs_and_a_group_of_their_own(order: list[int]) -> None:
    with Pool() as pool:  # of its own: the environment of the processes is changed
        assert pool.run(2, close_in_order, order, True) == [False, False]
