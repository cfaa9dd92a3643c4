"""Who tests the full network, and how often, as the cost model sees it."""

from typing import Any

import pytest
import torch
from torch import nn

from resist.blocks.chains import choose_chains
from resist.cost.evaluation import Process, choose_testers, forward_pass, num_tests
from resist.models import PreActResNet


def processes(*more: dict[str, Any], **common: Any) -> list[Process]:
    """Four processes of a machine with four cores, or those with `more`."""
    usual = {"place": "a cpu", "at_once": 4, "free_bytes": 10**9, "fetch_bytes": 10**8} | common
    return [Process(**usual | own) for own in more or ({},) * 4]


def test_all_test_where_cores_and_memory_allow_it() -> None:
    choice = choose_testers(processes(), busy_s=8.0, memory_bytes=10**8)
    assert (choice.everywhere, choice.seconds) == (True, 2.0)
    # Four processes take turns on two cores: alone, each takes half as long, and two of them half of that.
    assert choose_testers(processes(at_once=2), busy_s=8.0, memory_bytes=10**8).seconds == 2.0


@pytest.mark.parametrize(
    ("common", "memory_bytes", "reason"),
    [
        ({}, 3 * 10**8, "process 0: a cpu has 1.0 GB free, the network in its processes would need 1.2 GB"),
        ({"at_once": 1}, 10**8, "the processes share one device, or too few cores"),
        ({"link_bytes_s": 1e7}, 10**8, "getting the network takes 10.0 s over the slowest link"),
    ],
)
def test_one_tests_where_something_is_missing(common: dict[str, Any], memory_bytes: int, reason: str) -> None:
    # Over a slow link, the first process has all blocks already, as where everyone holds everything.
    each = [{"fetch_bytes": 0}, {}, {}, {}] if "link_bytes_s" in common else [{}] * 4
    choice = choose_testers(processes(*each, **common), busy_s=8.0, memory_bytes=memory_bytes)
    assert (choice.everywhere, choice.reason) == (False, reason)
    assert choice.seconds == (2.0 if "at_once" in common else 8.0)
    forced = choose_testers(processes(*each, **common), busy_s=8.0, memory_bytes=memory_bytes, wanted="all")
    assert forced.everywhere


def test_machines_count_together_and_the_slowest_link_decides() -> None:
    two = processes({}, {"place": "b cpu", "link_bytes_s": 1e8}, at_once=1)
    assert choose_testers(two, busy_s=8.0, memory_bytes=1).seconds == 5.0
    assert not choose_testers(two, busy_s=1.0, memory_bytes=1).everywhere
    assert not choose_testers(processes({}), busy_s=1.0, memory_bytes=1, wanted="all").everywhere


def test_tests_cost_less_than_a_tenth_of_the_run() -> None:
    assert num_tests(run_s=90.0, test_s=2.0, most=10) == 5
    assert num_tests(run_s=90.0, test_s=0.1, most=10) == 10
    assert num_tests(run_s=1.0, test_s=5.0, most=10) == 1  # the last one is always made
    for test_s in (0.3, 0.7, 1.3, 4.0):
        num = num_tests(run_s=90.0, test_s=test_s, most=1000)
        assert num * test_s <= 0.1 * (90.0 + num * test_s) < (num + 1) * test_s


def test_a_forward_pass_is_measured_without_weights() -> None:
    with torch.device("meta"):
        model = PreActResNet((1, 1, 7, 1), 10, width=8)
    chains = choose_chains(model)
    full = forward_pass(model, chains, [6], 4, (3, 32, 32))
    half = forward_pass(model, chains, [3], 16, (3, 32, 32))
    assert full is not None
    assert half is not None
    assert full.flops > half.flops > full.flops / 2
    assert half.peak_bytes > 2 * full.peak_bytes  # of four times as many images
    assert forward_pass(nn.Sequential(model), chains, [6], 4, (1, 32)) is None
