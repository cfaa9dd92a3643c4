"""Agreement between processes, on plain data: differences are reported, and results are the same everywhere."""

import json
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from resist.errors import AgreedError, UserError
from resist.job import Job
from resist.planning.strategy import OuterSGD, resist
from resist.sync.agreement import agree_on_round, check_agreement, run_everywhere
from resist.sync.averaging import VELOCITY
from resist.sync.local import Local
from support import tiny


class Two(Local):
    """The transport of process 0 of two; `text` is what process 1 sends."""

    num_processes = 2

    def __init__(self, text: str) -> None:
        super().__init__(2)
        self.text = text

    def all_gather_text(self, text: str) -> list[str]:
        return [text, self.text]


def hosted(index: int, flat: torch.Tensor, state: object = MappingProxyType({}), average: object = None) -> Any:
    """The part of a worker that its process looks at before an exchange."""
    return SimpleNamespace(index=index, subnet=SimpleNamespace(flats={flat.dtype: flat}), state=state, average=average)


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
        (OuterSGD(), (0, 0), r"process 1 was started with `strategy=.*OuterSGD.*, process 0 with `strategy=.*None"),
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
        Job(tiny, resist(2), transport=Two(sent[0]))


def test_an_action_fails_everywhere_or_nowhere() -> None:
    def fail() -> int:
        raise UserError("disk full")

    assert run_everywhere(Two(""), lambda: 3) == 3
    with pytest.raises(AgreedError, match=r"disk full \(process 0\)"):
        run_everywhere(Two(""), fail)
    with pytest.raises(AgreedError, match=r"no file \(process 1\)"):
        run_everywhere(Two("no file"), lambda: 3)


def test_a_round_has_the_states_and_the_failures_of_all_processes() -> None:
    types, other = {"torch.float32": "torch.float32"}, torch.zeros(1, dtype=torch.float64)
    text = json.dumps(
        {"averages": False, "state": {"exp_avg": types, "step": types}, "nonfinite": {"3": "a loss of nan"}}
    )
    state = {name: {torch.float32: other} for name in ("momentum", "exp_avg", VELOCITY)}
    workers = [hosted(0, torch.zeros(2), state=state), hosted(1, torch.tensor([0.0, torch.nan]))]
    agreed = agree_on_round(Two(text), workers, nonfinite={0: "inf"})
    assert list(agreed.states) == ["exp_avg", "momentum", "step"]
    assert agreed.states["momentum"] == {torch.float32: torch.float64}
    assert agreed.nonfinite == {0: "inf", 1: "weights that are not finite", 3: "a loss of nan"}
    with pytest.raises(AgreedError, match=r"job\.follow was called in some processes and not in others"):
        agree_on_round(Two(text), [hosted(0, torch.zeros(2), average=object())], nonfinite={})
