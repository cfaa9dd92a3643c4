"""Agreement between processes, on plain data: differences are reported, and results are the same everywhere."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from resist.errors import AgreedError, UserError
from resist.job import Job
from resist.planning.strategy import OuterSGD, Strategy, local_sgd, resist, switch
from resist.sync.agreement import check_agreement, run_everywhere, strategy_values
from resist.sync.averaging import VELOCITY
from resist.sync.local import Local
from resist.sync.round_agreement import agree_on_round
from resist.sync.round_end import RoundEnd
from support import make, tiny


class Two(Local):
    """The transport of process 0 of two; `answer` is what process 1 sends, or the function that makes it of the text of
    process 0."""

    num_processes = 2

    def __init__(self, answer: str | Callable[[str], str]) -> None:
        super().__init__(2)
        self.answer, self.num_texts = answer, 0

    def all_gather_text(self, text: str) -> list[str]:
        self.num_texts += 1
        return [text, self.answer(text) if callable(self.answer) else self.answer]


def answering(**changes: Any) -> Two:
    """Process 1 sends what process 0 does, with these changes; of two tables the union."""

    def answer(text: str) -> str:
        own = json.loads(text)
        both = {k: {**v, **own[k]} if isinstance(own[k], dict) else v for k, v in changes.items()}
        return json.dumps({**own, **both})

    return Two(answer)


def test_the_first_difference_is_reported() -> None:
    values = {"seed": 0, "capacities": [3, 3], "weights": "a"}
    check_agreement(Two(json.dumps(values)), values)
    with pytest.raises(
        AgreedError, match=r"process 1 was started with `capacities=\[2, 4\]`, process 0 with `capacities="
    ):
        check_agreement(Two(json.dumps({**values, "weights": "b", "capacities": [2, 4]})), values)


@pytest.mark.parametrize(
    ("outer", "resume_at", "message"),
    [
        (
            OuterSGD(),
            (0, 0),
            r"process 1 was started with `outer={'lr': 0.7, 'momentum': 0.9}`, process 0 with `outer=None`",
        ),
        (None, (1, 50), r"process 1 was started with `resume_at=\[1, 50\]`, process 0 with `resume_at=\[0, 0\]`"),
    ],
)
def test_jobs_agree_on_the_outer_optimizer_and_the_round(
    monkeypatch: pytest.MonkeyPatch, outer: OuterSGD | None, resume_at: tuple[int, int], message: str
) -> None:
    sent: list[str] = []

    def record(text: str) -> list[str]:
        sent.append(text)
        return [text, text]

    transport = Two("")
    monkeypatch.setattr(transport, "all_gather_text", record)
    Job(tiny, resist(2, outer=outer), transport=transport, resume_at=resume_at)
    with pytest.raises(AgreedError, match=message):
        Job(tiny, resist(2), transport=Two(lambda own: sent[-1] if own else ""))


def test_an_action_fails_everywhere_or_nowhere() -> None:
    def fail() -> int:
        raise UserError("disk full")

    assert run_everywhere(Two(""), lambda: 3) == 3
    with pytest.raises(AgreedError, match=r"disk full \(process 0\)"):
        run_everywhere(Two(""), fail)
    with pytest.raises(AgreedError, match=r"no file \(process 1\)"):
        run_everywhere(Two("no file"), lambda: 3)


def test_every_field_of_every_stage_is_compared() -> None:
    """Also one that a later version adds; functions are not."""

    @dataclass(frozen=True)
    class Later(Strategy):
        depth: tuple[int, ...] = (1, 2)
        draw: Callable[[], int] = lambda: 3

    plain = resist(2, outer=OuterSGD())
    stage = Later(**{field.name: getattr(plain, field.name) for field in fields(plain)})
    assert strategy_values(stage)["depth"] == [1, 2]
    values = strategy_values(switch(local_sgd(2), stage, at_round=3))
    assert values["workers"] == 2
    assert values["strategy"] == ["local_sgd", "resist"]
    assert values["at_round"] == [3, 0]
    assert values["outer"] == [None, {"lr": 0.7, "momentum": 0.9}]
    assert values["depth"] == [None, [1, 2]]
    assert not {"draw", "then"} & values.keys()
    assert values.keys() >= {field.name for field in fields(plain)} - {"name", "then"}
    json.dumps(values)


def round_end(job: Job) -> RoundEnd:
    return RoundEnd(2, 8, job.strategy, job.plan, job.plan_of(1))


def test_a_round_has_the_states_and_the_failures_of_all_processes() -> None:
    types = {"torch.float64": "torch.float64"}
    job, _ = make(resist(2, 1))
    first, second = job.workers
    first.state = {
        name: {torch.float64: torch.zeros(1, dtype=torch.float32)} for name in ("momentum", "exp_avg", VELOCITY)
    }
    with torch.no_grad():
        second.model.get_parameter("head.weight")[0, 0] = torch.nan
    transport = answering(state={"exp_avg": types, "step": types}, changed="1", nonfinite={"3": "a loss"})
    agreed = agree_on_round(transport, job.workers, round_end(job), {0: "inf"})
    assert list(agreed.states) == ["exp_avg", "momentum", "step"]
    assert agreed.states["momentum"] == {torch.float64: torch.float32}
    assert agreed.nonfinite == {0: "inf", 1: "weights that are not finite (head.weight)", 3: "a loss"}
    assert len(first.subnet.changing) == 1, "what changed in the other process"
    assert first.subnet.changing == second.subnet.changing
    assert transport.num_texts == 2  # the second time with the states of both
    agree_on_round(transport := answering(), job.workers, round_end(job), {})
    assert transport.num_texts == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"averages": True}, r"job\.follow was called in some processes and not in others"),
        (
            {"round": [2, 10]},
            r"process 1 ends round 3 at step 10, process 0 ends round 3 at step 8; call job\.step equally often in all",
        ),
        ({"optimizers": [["Adam"]]}, r"process 1 trains a worker with Adam, process 0 with SGD; give all workers"),
        ({"optimizers": [["SGD"], ["Adam"]]}, r"process 1 trains a worker with Adam, process 0 with SGD; give all"),
    ],
)
def test_a_round_ends_for_all_processes_at_the_same_point(changes: dict[str, Any], message: str) -> None:
    job, optimizers = make(resist(2, 1))
    job.attach(*optimizers)
    with pytest.raises(AgreedError, match=message):
        agree_on_round(answering(**changes), job.workers, round_end(job), {})
