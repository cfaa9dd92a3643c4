"""Fragments: the parts of what everyone trains that are averaged at times of their own in a round.

Each fragment has strips all over the network, so that none is a few layers only. This file is arithmetic on positions
and steps; `resist.sync.streaming` applies it.
"""

from dataclasses import dataclass

from resist.errors import UserError

STRIPS = 8  # of each fragment, dealt in turn
ALIGNED = 16  # a strip begins at a multiple of these numbers

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Times:
    """Steps of a round after which a fragment's mean goes on, counted from 1.

    Attributes:
        begin: Its numbers are read, and sent.
        advance: What has arrived is averaged, and the means are sent; only of a format with codes.
        finish: The mean is taken over.
    """

    begin: int
    advance: int
    finish: int


def fragment_strips(numel: int, fragments: int) -> list[Ranges]:
    """Deal strips of `numel` numbers to fragments in turn.

    Args:
        numel: How many numbers.
        fragments: Number of fragments.

    Returns:
        (first number, end) of each strip of each fragment, ascending. A fragment of few numbers may have none.
    """
    size = -(-numel // (STRIPS * fragments * ALIGNED)) * ALIGNED
    strips = [(start, min(start + size, numel)) for start in range(0, numel, size or 1)]
    return [strips[number::fragments] for number in range(fragments)]


def fragment_sizes(numel: int, fragments: int) -> list[int]:
    """Return how many numbers each fragment has; without those that have none."""
    sizes = [sum(end - start for start, end in strips) for strips in fragment_strips(numel, fragments)]
    return [size for size in sizes if size]


def fragment_times(local_steps: int, fragments: int, delay: int) -> list[Times]:
    """Distribute the fragments evenly over the steps of a round.

    Args:
        local_steps: Steps of the round.
        fragments: Number of fragments.
        delay: Steps from the beginning of a fragment's mean to its end.

    Returns:
        The times of each fragment: one is finished before the next one begins, the last one within the round.

    Raises:
        UserError: If the round is too short.
    """
    if fragments and local_steps < 2 * fragments:
        most = local_steps // 2
        remedy = f"give `fragments={most}` or fewer" if most else "leave out `fragments`"
        raise UserError(
            f"`fragments={fragments}` needs at least {2 * fragments} steps in a round, 2 for each, and there are "
            f"`local_steps={local_steps}`; {remedy}, or more steps"
        )
    if fragments and delay >= (most := local_steps // fragments):
        raise UserError(
            f"`delay={delay}` is too long: each of `fragments={fragments}` has {most} of `local_steps={local_steps}`; "
            f"give at most {most - 1}"
        )
    times: list[Times] = []
    for number in range(fragments):
        start, end = number * local_steps // fragments, (number + 1) * local_steps // fragments
        begin = start + (end - start - delay + 1) // 2
        times.append(Times(begin, begin + (delay + 1) // 2, begin + delay))
    return times
