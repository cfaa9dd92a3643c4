"""Compiled sub-networks: graphs for the combinations of values in the slots.

`torch.compile` makes a graph for each combination of flags and integers that a sub-network meets. After eight it runs
in eager mode without a word. Where attributes differ along a chain, each round can be a new combination.
"""

import logging
import sys
from collections.abc import Hashable, Sequence
from typing import Any

log = logging.getLogger(__name__)

MOST_GRAPHS = 1024  # each takes seconds to minutes to compile


def num_combinations(values: Sequence[Hashable], capacity: int) -> int:
    """Count the combinations of values that the slots of a chain can have.

    Args:
        values: Values of each block of the chain.
        capacity: Number of slots. They hold blocks in ascending order.

    Returns:
        Number of distinct subsequences of `values` of that length.
    """
    # counts[n]: distinct subsequences of length n so far; ended[v][n]: those that end with v.
    counts = [1] + [0] * capacity
    ended: dict[Hashable, list[int]] = {}
    for value in values:
        new = [0, *counts[:-1]]
        old = ended.get(value, [0] * (capacity + 1))
        counts = [count + n - o for count, n, o in zip(counts, new, old, strict=True)]
        ended[value] = new
    return counts[capacity]


def missed_changes() -> str:
    """Say why a compiled network does not notice here that attributes change; "": it does, or nothing is compiled.

    With some versions of torch on Python 3.13.0 it goes on with the former ones.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    tags = "use_recursive_dict_tags_for_guards"
    if dynamo is None or sys.version_info[:3] != (3, 13, 0) or not getattr(dynamo.config, tags, False):
        return ""
    return (
        "torch.compile does not notice on Python 3.13.0 that flags of a module change, and computes something else; "
        f"take Python 3.13.1 or later, or set torch._dynamo.config.{tags} = False before the first step"
    )


def allow_graphs(number: int, chain: str, noted: set[str]) -> None:
    """Raise the limit of graphs for a compiled network, and say so once.

    Does nothing in a process that compiles nothing.

    Args:
        number: Number of graphs that the network can need.
        chain: Name of the chain, for the note.
        noted: What has been said about the chain; more is added.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.utils.counters["stats"]["unique_graphs"]:
        return
    if (missed := missed_changes()) and "changes" not in noted:  # perhaps of another network
        noted.add("changes")
        log.warning("flags or integers differ along %s: %s", chain, missed)
    config = dynamo.config
    if number <= config.recompile_limit or "torch.compile" in noted:
        return
    noted.add("torch.compile")
    config.recompile_limit = min(number, MOST_GRAPHS) + 8
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * config.recompile_limit)
    log.warning(
        "flags or integers differ along %s: torch.compile makes a graph for each combination that it meets in the slots"
        ", up to %d; its limit is raised to %d. Compiling each block (block.compile()) takes fewer",
        chain,
        number,
        config.recompile_limit,
    )
