"""The choice of fragments: valid, hidden, late by as little as that takes, and none where there is nothing to hide."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist.cost.links import PAYLOAD, Link, Links
from resist.cost.overlap import MOST_LATE, NEGLIGIBLE, choose_fragments
from resist.cost.timing import fragments_s
from resist.cost.traffic import RoundTraffic
from resist.planning.fragments import fragment_times
from resist.planning.schedule import allreduce_bytes
from resist.planning.wire import FP32, WIRES, Wire, fragment_bytes

NUMEL = 15_400_000  # the shared part of a ResNet101


def chosen(wire: str, gbit_s: float, *, local_steps: int = 50, step_s: float = 0.1, workers: int = 4) -> Wire:
    """The choice for a link of a rate, which has carried twice what all average."""
    num_bytes = 2 * allreduce_bytes(fragment_bytes(WIRES[wire].shared, NUMEL, 1)[0], workers)
    return choose_fragments(
        WIRES[wire], NUMEL, workers=workers, local_steps=local_steps, step_s=step_s,
        exchange_s=num_bytes / (gbit_s * 1e9 / 8), exchange_bytes=num_bytes,
    )  # fmt: skip


def waited(wire: Wire, gbit_s: float, *, local_steps: int, step_s: float, workers: int) -> float:
    """Seconds in a round that training waits for the fragments, as `resist cost` predicts them."""
    sizes = tuple(allreduce_bytes(n, workers) for n in fragment_bytes(wire.shared, NUMEL, wire.fragments))
    traffic = RoundTraffic(
        {}, sum(sizes), 0, {}, {}, compressed=len(sizes) if wire.shared != FP32 else 0, fragments=sizes
    )
    times = fragment_times(local_steps, wire.fragments, wire.delay)
    return fragments_s(traffic, Links((Link(gbit_s / PAYLOAD),)), workers, times, step_s)[0]


@pytest.mark.parametrize(
    ("wire", "gbit_s", "expected"),
    [
        ("fp32", 100.0, (0, 1)),  # 15 ms of 5 s
        ("fp32", 10.0, (1, 1)),  # 74 ms: a single piece, in one step
        ("fp32", 1.0, (7, 1)),  # 0.74 s: seven pieces of 106 ms, of which 6 ms each are not hidden
        ("int8", 1.0, (1, 2)),  # 187 ms, in two halves of a step each
        ("int8", 0.1, (9, 2)),  # 1.9 s: nine pieces of 209 ms
        ("fp32", 0.02, (8, 5)),  # 37 s of 5 s: hidden as far as a tenth of a round allows
    ],
)
def test_choices_for_a_large_network(wire: str, gbit_s: float, expected: tuple[int, int]) -> None:
    found = chosen(wire, gbit_s)
    assert (found.fragments, found.delay) == expected
    assert found.formats == WIRES[wire].formats


@given(
    st.sampled_from(list(WIRES)), st.floats(-2, 3), st.integers(1, 300), st.floats(-4, 1), st.integers(2, 9)
)  # fmt: skip
def test_a_choice_fits_into_the_round_and_no_shorter_delay_hides_it(
    wire: str, rate: float, local_steps: int, step: float, workers: int
) -> None:
    setting: dict[str, Any] = {"local_steps": local_steps, "step_s": 10**step, "workers": workers}
    gbit_s = 10**rate
    found = chosen(wire, gbit_s, **setting)
    whole_s = allreduce_bytes(fragment_bytes(found.shared, NUMEL, 1)[0], workers) / (gbit_s * 1e9 / 8)
    bound = NEGLIGIBLE * (local_steps * 10**step + 2 * whole_s)
    if not found.fragments:
        assert local_steps < 2 or whole_s <= bound * 1.0001
        return
    found.times(local_steps)  # which raises where it does not fit
    assert found.delay <= max(2, MOST_LATE * local_steps)
    hidden = waited(found, gbit_s, **setting) < bound * 1.0001
    for delay in range(1, found.delay if hidden else found.delay + 1):
        for fragments in range(1, min(local_steps // 2, 12) + 1):
            if delay < local_steps // fragments:
                other = Wire(found.shared, found.blocks, found.state, fragments=fragments, delay=delay)
                seconds = waited(other, gbit_s, **setting)
                assert seconds >= (bound if hidden else waited(found, gbit_s, **setting)) * 0.9999


@pytest.mark.parametrize("changed", [{"workers": 1}, {"numel": 0}, {"exchange_s": 0.0}, {"exchange_bytes": 0.0}])
def test_there_is_none_where_nothing_is_exchanged(changed: dict[str, Any]) -> None:
    measured = {"numel": NUMEL, "workers": 4, "exchange_s": 10.0, "exchange_bytes": 1e8, **changed}
    numel = measured.pop("numel")
    assert choose_fragments(Wire("int8"), numel, local_steps=50, step_s=0.1, **measured) == Wire("int8")
