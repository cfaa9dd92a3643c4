"""Agreement between processes, on plain data: differences are reported, and results are the same everywhere."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resist.errors import AgreedError, UserError
from resist.sync.agreement import agree_on_round, check_agreement, run_everywhere
from resist.sync.averaging import VELOCITY
from resist.sync.local import Local


class Two(Local):
    """The transport of process 0 of two; `text` is what process 1 sends."""

    num_processes = 2

    def __init__(self, text: str) -> None:
        super().__init__(2)
        self.text = text

    def all_gather_text(self, text: str) -> list[str]:
        return [text, self.text]


def hosted(index: int, flat: torch.Tensor, state: object = (), average: object = None) -> Any:
    """The part of a worker that its process looks at before an exchange."""
    return SimpleNamespace(index=index, subnet=SimpleNamespace(flat=flat), state=state, average=average)


def test_the_first_difference_is_reported() -> None:
    values = {"seed": 0, "capacities": [3, 3], "weights": "a"}
    check_agreement(Two(json.dumps(values)), values)
    with pytest.raises(
        AgreedError, match=r"process 1 was started with `capacities=\[2, 4\]`, process 0 with `capacities="
    ):
        check_agreement(Two(json.dumps({**values, "weights": "b", "capacities": [2, 4]})), values)


def test_an_action_fails_everywhere_or_nowhere() -> None:
    def fail() -> int:
        raise UserError("disk full")

    assert run_everywhere(Two(""), lambda: 3) == 3
    with pytest.raises(AgreedError, match=r"disk full \(process 0\)"):
        run_everywhere(Two(""), fail)
    with pytest.raises(AgreedError, match=r"no file \(process 1\)"):
        run_everywhere(Two("no file"), lambda: 3)


def test_a_round_has_the_states_and_the_failures_of_all_processes() -> None:
    text = json.dumps({"averages": False, "state": ["exp_avg", "step"], "nonfinite": {"3": "a loss of nan"}})
    state = dict.fromkeys(("momentum", "exp_avg", VELOCITY))
    workers = [hosted(0, torch.zeros(2), state=state), hosted(1, torch.tensor([0.0, torch.nan]))]
    agreed = agree_on_round(Two(text), workers, nonfinite={0: "inf"})
    assert agreed.state_names == ["exp_avg", "momentum", "step"]
    assert agreed.nonfinite == {0: "inf", 1: "weights that are not finite", 3: "a loss of nan"}
    with pytest.raises(AgreedError, match=r"job\.follow was called in some processes and not in others"):
        agree_on_round(Two(text), [hosted(0, torch.zeros(2), average=object())], nonfinite={})
