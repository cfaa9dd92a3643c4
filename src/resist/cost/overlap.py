"""The choice of fragments: as little late, and as few, as hide the exchange of the shared part behind training."""

from dataclasses import replace

from resist.cost.links import PAYLOAD, Link, Links
from resist.cost.timing import fragments_s
from resist.cost.traffic import RoundTraffic
from resist.planning.fragments import fragment_times
from resist.planning.schedule import allreduce_bytes
from resist.planning.wire import FP32, Wire, fragment_bytes

# Share of a round that is not worth hiding.
NEGLIGIBLE = 0.01
# Share of a round that a mean may be late, though not below 2 steps: a fifth of a round has cost accuracy.
MOST_LATE = 0.1
MOST_FRAGMENTS = 64


def choose_fragments(
    wire: Wire, numel: int, *, workers: int, local_steps: int, step_s: float, exchange_s: float, exchange_bytes: float
) -> Wire:
    """Choose fragments and delay from what a round without fragments has taken.

    The delay is the shortest with which training waits for less than 1 % of a round, and the number of fragments the
    smallest with this delay. If there is none, training waits as little as it can with a delay of up to a tenth of the
    round. An exchange of the shared part that takes less than 1 % of a round is left at the round's end.

    Args:
        wire: The formats.
        numel: Numbers that all workers average, in single precision.
        workers: S, the number of workers.
        local_steps: Steps of a round.
        step_s: Seconds of a step.
        exchange_s: Seconds of a synchronization.
        exchange_bytes: Bytes that a worker sends in it, on average.

    Returns:
        The formats, with fragments and delay.
    """
    whole = replace(wire, fragments=0, delay=1)
    if workers < 2 or numel < 1 or exchange_s <= 0 or exchange_bytes <= 0:
        return whole
    links = Links((Link(exchange_bytes / exchange_s * 8 / 1e9 / PAYLOAD),))
    bound = NEGLIGIBLE * (local_steps * step_s + exchange_s)
    sizes = {
        fragments: tuple(allreduce_bytes(n, workers) for n in fragment_bytes(wire.shared, numel, fragments))
        for fragments in range(1, min(local_steps // 2, MOST_FRAGMENTS) + 1)
    }
    if not sizes or sum(sizes[1]) / links.slowest_bytes_s < bound:
        return whole
    found: list[tuple[float, int, int]] = []
    for delay in range(1, max(2, int(MOST_LATE * local_steps)) + 1):
        for fragments, each in sizes.items():
            if delay >= local_steps // fragments:
                break
            encoded = 0 if wire.shared == FP32 else len(each)
            traffic = RoundTraffic({}, sum(each), 0, {}, {}, compressed=encoded, fragments=each)
            times = fragment_times(local_steps, fragments, delay)
            found.append((fragments_s(traffic, links, workers, times, step_s)[0], delay, fragments))
            if found[-1][0] < bound:
                return replace(wire, fragments=fragments, delay=delay)
    _, delay, fragments = min(found)
    return replace(wire, fragments=fragments, delay=delay)
