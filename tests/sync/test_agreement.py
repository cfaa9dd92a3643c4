"""Agreement between processes, on plain data: differences are reported, and results are the same everywhere."""

import json

import pytest

from resist.errors import AgreedError, UserError
from resist.sync.agreement import agree_on_round, check_agreement, run_everywhere
from resist.sync.local import Local


class Two(Local):
    """The transport of process 0 of two; `text` is what process 1 sends."""

    num_processes = 2

    def __init__(self, text: str) -> None:
        super().__init__(2)
        self.text = text

    def all_gather_text(self, text: str) -> list[str]:
        return [text, self.text]


def test_the_first_difference_is_reported() -> None:
    values = {"seed": 0, "capacities": [3, 3], "weights": "a"}
    check_agreement(Two(json.dumps(values)), values)
    with pytest.raises(
        AgreedError, match=r"process 1 was started with capacities=\[2, 4\], process 0 with capacities="
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
    agreed = agree_on_round(Two(text), averages=False, state_names={"momentum", "exp_avg"}, nonfinite={0: "inf"})
    assert agreed.state_names == ["exp_avg", "momentum", "step"]
    assert agreed.nonfinite == {0: "inf", 3: "a loss of nan"}
    with pytest.raises(AgreedError, match=r"job\.follow was called in some processes and not in others"):
        agree_on_round(Two(text), averages=True, state_names=[], nonfinite={})
