"""The exchange: one batch per phase, and as many bytes as the formula gives."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from resist.job import Job
from resist.planning.schedule import allreduce_bytes
from resist.planning.strategy import local_sgd, resist
from resist.sync.local import Local
from resist.sync.traffic import CountingTransport
from resist.sync.transport import PACKET_BYTES, Handle, Move, hosted_workers
from support import adamw, make, sgd, tiny, train


class Counting(Local):
    """Records calls and moves."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.calls: list[str] = []
        self.moves: list[Move] = []

    def transfer(self, moves: Sequence[Move]) -> Handle:
        self.calls.append("transfer")
        self.moves += moves
        return super().transfer(moves)

    def mean(self, tensors: Sequence[Tensor], traffic_kind: str, scale: float = 1.0) -> Handle:
        self.calls.append(f"mean {traffic_kind}")
        return super().mean(tensors, traffic_kind, scale)


@pytest.mark.parametrize(
    ("policy", "means"),
    [("reset", ["shared"]), ("travel", ["shared"]), ("average", ["shared", "state", "state"])],
)
def test_a_round_is_one_batch_per_phase(policy: str, means: list[str]) -> None:
    transport = Counting(3)
    job, optimizers = make(resist(3, 1, optimizer_state=policy), adamw, transport=transport)
    train(job, optimizers, 1)
    assert transport.calls == [*(f"mean {traffic_kind}" for traffic_kind in means), "transfer", "transfer"]


def block_messages(job: Job, round: int) -> int:
    """The number of messages from the plans of `round` to the next ones, counted from the plans alone."""
    total = 0
    plan, after = job.plan_of(round), job.plan_of(round + 1)
    for key in plan.keys:
        holders, targets = set(plan.holders(*key)), set(after.holders(*key))
        total += len(holders) - 1 + len(targets) - bool(holders & targets)
    return total


@pytest.mark.parametrize("capacities", [pytest.param((2, 2, 2), marks=pytest.mark.slow), (6, 3, 1)])
@pytest.mark.parametrize(("optimizer", "num_states"), [pytest.param(sgd, 1, marks=pytest.mark.slow), (adamw, 2)])
@pytest.mark.parametrize("policy", ["reset", "keep", "travel", "average"])
def test_ledger(policy: str, optimizer, num_states: int, capacities: tuple[int, ...]) -> None:
    """Bytes by traffic kind from sizes and plans, for three rounds and the assembly of the full network."""
    transport = Counting(3)
    strategy = resist(3, 1, capacities=capacities, optimizer_state=policy)
    job, optimizers = make(strategy, optimizer, transport=transport)
    subnet = job.workers[0].subnet
    shared, block = subnet.layout.shared.numel * 8, subnet.layout.blocks[0].numel * 8
    job.transport.take()
    for round in range(3):
        transport.moves.clear()
        train(job, optimizers, 1)
        taken = job.transport.take()
        messages = block_messages(job, round)
        expected = {"shared": 3 * allreduce_bytes(shared, 3), "blocks": messages * block}
        state = num_states * (policy in ("travel", "average")) * expected["blocks"]
        state += num_states * (policy == "average") * expected["shared"]
        assert taken["bytes"] == expected | ({"state": state} if state else {})
        sent: Counter[tuple[int, int]] = Counter()
        for move in transport.moves:
            assert move.outgoing is not None
            assert move.num_bytes == move.outgoing.numel() * move.outgoing.element_size()
            sent[move.source, move.target] += move.num_bytes
        assert taken["pairs"] == [[source, target, n] for (source, target), n in sorted(sent.items())]
        assert not any(taken["wire_bytes"].values())  # type: ignore[union-attr]
    (plan,) = job.plan.plans
    job.full_model(on=1)
    assert job.transport.take()["bytes"] == {"evaluate": (plan.num_blocks - len(plan.blocks[1])) * block}


def test_local_sgd_books_everything_as_shared() -> None:
    job, optimizers = make(local_sgd(2, 1), transport=Counting(2))
    train(job, optimizers, 1)
    numel = sum(t.numel() for t in tiny().state_dict().values() if t.is_floating_point())
    assert job.transport.take()["bytes"] == {"shared": 2 * allreduce_bytes(8 * numel, 2)}


def test_texts_are_booked_as_control() -> None:
    class Three(Local):
        num_processes = 3

        def all_gather_text(self, text: str) -> list[str]:
            return [text, "grüße", ""]

    ledger = CountingTransport(Three(3))
    assert ledger.all_gather_text("abc") == ["abc", "grüße", ""]
    taken = ledger.take()
    assert taken["bytes"] == taken["wire_bytes"] == {"control": 3 * 2 * PACKET_BYTES}
    assert ledger.take()["bytes"] == {}


def test_the_full_network_is_the_same_wherever_it_is_assembled() -> None:
    job, optimizers = make(resist(3, 1, capacities=(4, 2, 3)))
    train(job, optimizers, 2)
    first, other = job.full_model(on=0), job.full_model(on=2)
    assert first is not None
    assert other is not None
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(("workers", "processes"), [(4, 1), (4, 2), (3, 2), (7, 3), (5, 5)])
def test_hosting_is_even_and_complete(workers: int, processes: int) -> None:
    hosted = hosted_workers(workers, processes)
    assert [worker for workers_ in hosted for worker in workers_] == list(range(workers))
    assert max(map(len, hosted)) - min(map(len, hosted)) <= 1
