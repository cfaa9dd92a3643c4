"""Learning rates, and the numbers of steps and evaluations."""

import math
from itertools import pairwise

import pytest

from resist.runs.config import OptimizationConfig
from resist.training.lr_schedule import evaluation_rounds, num_steps, rate


def test_step_schedule_is_the_papers() -> None:
    config = OptimizationConfig(lr=1.0, lr_schedule="step")
    rates = [rate(config, step, 8) for step in range(8)]
    assert rates == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]


def test_cosine_falls_from_the_full_rate_to_nothing() -> None:
    config = OptimizationConfig(lr=2.0, lr_schedule="cosine", lr_warmup_steps=4)
    rates = [rate(config, step, 104) for step in range(104)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[54] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.001


def test_the_number_of_steps_covers_the_epochs() -> None:
    assert num_steps(OptimizationConfig(epochs=40, batch_size=128), 50000) == math.ceil(40 * 50000 / 128)
    assert num_steps(OptimizationConfig(epochs=0.001, batch_size=128), 50000) == 1


@pytest.mark.parametrize(("rounds", "times"), [(1, 10), (7, 3), (10, 10), (313, 10), (3, 5)])
def test_evaluations_are_spread_and_the_last_is_at_the_end(rounds: int, times: int) -> None:
    tested = evaluation_rounds(rounds, times)
    assert max(tested) == rounds
    assert min(tested) >= 1
    assert len(tested) == min(rounds, times)
