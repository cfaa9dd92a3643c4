"""Balance: how many blocks each worker should hold, so that workers of different speed need the same time for a step.

The time of a worker's step is modelled as `slowness * (1 + sum over chains of cost * blocks)`: the shared part costs 1,
and a block of a chain so much of it. Slowness is what is measured; it stays the same when the capacities change.

    >>> balanced([[6, 6, 6, 6]], [22], [0.1], [1.0, 1.0, 1.0, 1.3], step=2)
    [[7, 7, 6, 4]]
"""

from collections.abc import Sequence

STEP = 1  # blocks of a chain by which a worker's capacity changes at once
GAIN = 0.03  # the share of a step's time that the best capacities must save


def slowness(step_s: float, costs: Sequence[float], capacities: Sequence[int]) -> float:
    """Return the seconds that the shared part takes a worker.

    Args:
        step_s: Seconds of its step.
        costs: Of a block of each chain, as a share of what the shared part costs.
        capacities: Blocks of each chain that it holds.
    """
    return step_s / _work(costs, capacities)


def slowest(capacities: Sequence[Sequence[int]], costs: Sequence[float], slow: Sequence[float]) -> float:
    """Return the seconds of a step of the slowest worker, for which all wait.

    Args:
        capacities: For each chain the blocks of each worker.
        costs: Of a block of each chain, as a share of what the shared part costs.
        slow: Slowness of each worker.
    """
    return max(own * _work(costs, held) for own, held in zip(slow, zip(*capacities, strict=True), strict=True))


def balanced(
    capacities: Sequence[Sequence[int]], lengths: Sequence[int], costs: Sequence[float], slow: Sequence[float], *,
    step: int = STEP, gain: float = GAIN,
) -> list[list[int]]:  # fmt: skip
    """Move blocks from slow workers to fast ones, as long as the slowest step gets shorter.

    The workers hold as many blocks in total as before. One block after another is moved from the worker that all wait
    for, so the result for `step` = all blocks of a chain is that of trying all vectors, within the time of one block.

    Args:
        capacities: For each chain the blocks of each worker.
        lengths: Number of blocks of each chain.
        costs: Of a block of each chain, as a share of what the shared part costs.
        slow: Slowness of each worker.
        step: Blocks of a chain by which a worker's capacity may change.
        gain: Share of the slowest step's time that the best capacities must save, however many steps away; otherwise
            nothing is moved, so that noise in the measurement changes nothing.

    Returns:
        The capacities, in the same form.
    """
    best = _moved(capacities, lengths, costs, slow, max(lengths))
    if slowest(best, costs, slow) > (1 - gain) * slowest(capacities, costs, slow):
        return [list(chain) for chain in capacities]
    return _moved(capacities, lengths, costs, slow, step)


def _moved(
    first: Sequence[Sequence[int]], lengths: Sequence[int], costs: Sequence[float], slow: Sequence[float], step: int
) -> list[list[int]]:
    """Move blocks as long as that helps, no worker's capacity by more than `step`."""
    found = [list(chain) for chain in first]
    while move := _best_move(first, found, lengths, costs, slow, step):
        chain, source, target = move
        found[chain][source] -= 1
        found[chain][target] += 1
    return found


def _best_move(
    first: Sequence[Sequence[int]], now: Sequence[Sequence[int]], lengths: Sequence[int], costs: Sequence[float],
    slow: Sequence[float], step: int,
) -> tuple[int, int, int] | None:  # fmt: skip
    """Find the move of one block, (chain, from, to), that leaves both workers faster than the slowest one is now."""
    times = [own * _work(costs, held) for own, held in zip(slow, zip(*now, strict=True), strict=True)]
    source = max(range(len(slow)), key=lambda worker: times[worker])
    moves: list[tuple[float, float, int, int]] = []

    def time_of(worker: int, chain: int, more: int) -> float:
        """Seconds of a step of a worker with `more` blocks. Computed as `times`: else rounding looks like a gain."""
        held = [blocks[worker] + more * (number == chain) for number, blocks in enumerate(now)]
        return slow[worker] * _work(costs, held)

    for chain, held in enumerate(now):
        if held[source] <= max(1, first[chain][source] - step):
            continue
        for target in range(len(slow)):
            if target != source and held[target] < min(lengths[chain], first[chain][target] + step):
                longer = time_of(target, chain, 1)
                moves.append((max(longer, time_of(source, chain, -1)), longer, chain, target))
    if not moves:
        return None
    slowest_after, _, chain, target = min(moves)
    return (chain, source, target) if slowest_after < times[source] else None


def _work(costs: Sequence[float], capacities: Sequence[int]) -> float:
    return 1 + sum(cost * held for cost, held in zip(costs, capacities, strict=True))
