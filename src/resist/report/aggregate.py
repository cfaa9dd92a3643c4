"""Holdings and traffic of a run: the numbers behind the partition map and the traffic matrix."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from resist.report.bitmap import CLEAR
from resist.report.colors import color_of
from resist.report.units import sample
from resist.runs.history import History
from resist.runs.records import ALLREDUCED, EVALUATE, allreduced_bytes

COLUMNS, CELLS = 400, 40_000  # the largest map
MOST = 16  # holders of a block with a color each; more are gray
MANY = "#8d949e"


@dataclass(frozen=True)
class Holdings:
    """The holders of one chain's blocks over a run.

    Attributes:
        chain: The name of the chain.
        blocks: Its number of blocks.
        workers: The number of workers.
        rounds: The numbers of the rounds that are shown.
        every: One of so many rounds is shown.
        holders: holders[column][block]: the workers that held the block in that round, ascending.
        shares: shares[worker][block]: the share of all rounds in which the worker held it.
    """

    chain: str
    blocks: int
    workers: int
    rounds: list[int]
    every: int
    holders: list[list[tuple[int, ...]]]
    shares: list[list[float]]


def holdings(history: History) -> list[Holdings]:
    """The holdings of each chain, in the order in which the records name them."""
    chains = dict.fromkeys(name for record in history.rounds for name in record["plan"])
    return [_of_chain(history, chain) for chain in chains]


def _of_chain(history: History, chain: str) -> Holdings:
    records = [record for record in history.rounds if record["plan"].get(chain)]
    return holdings_of(chain, [record["plan"][chain] for record in records], [record["round"] for record in records])


def holdings_of(chain: str, plans: Sequence[Sequence[Sequence[int]]], rounds: Sequence[int]) -> Holdings:
    """The holdings of a chain.

    Args:
        chain: The name of the chain.
        plans: plans[i][worker]: the blocks that the worker held.
        rounds: The number of each round, as many as there are plans.
    """
    blocks = 1 + max((block for plan in plans for held in plan for block in held), default=0)
    workers = max(len(plan) for plan in plans)
    counts = [[0] * blocks for _ in range(workers)]
    for plan in plans:
        for worker, held in enumerate(plan):
            for block in held:
                counts[worker][block] += 1
    kept = sample(len(plans), max(1, min(COLUMNS, CELLS // blocks)))
    holders: list[list[tuple[int, ...]]] = []
    for position in kept:
        of_block: list[list[int]] = [[] for _ in range(blocks)]
        for worker, held in enumerate(plans[position]):
            for block in held:
                of_block[block].append(worker)
        holders.append([tuple(workers_of) for workers_of in of_block])
    every = kept[1] - kept[0] if len(kept) > 1 else 1
    shares = [[count / len(plans) for count in of_worker] for of_worker in counts]
    return Holdings(chain, blocks, workers, [rounds[i] for i in kept], every, holders, shares)


def map_rows(chain: Holdings) -> tuple[list[bytes], list[str], int]:
    """Pixels of a partition map: a column for each round, a row for each block.

    A block that several workers held is cut into as many stripes of equal height, in their colors. A clear line
    separates blocks, and rounds too where there are few of them.

    Returns:
        The rows of pixels as numbers of the palette, the palette, and the height of a block in pixels.
    """
    most = max((len(workers) for column in chain.holders for workers in column), default=1)
    stripes = max(min(most, MOST), min(14, max(5, 420 // chain.blocks)))
    palette = [color_of(worker) for worker in range(min(chain.workers, 254))] + [MANY]
    wide = len(chain.holders) <= 60
    rows: list[bytes] = []
    for block in range(chain.blocks):
        cells = [column[block] for column in chain.holders]
        for y in range(stripes):
            numbers = [_number(holders, y, stripes, len(palette)) for holders in cells]
            rows.append(b"".join(bytes([n]) * 11 + bytes([CLEAR]) for n in numbers) if wide else bytes(numbers))
        rows.append(bytes(len(rows[-1])))
    return rows, palette, stripes + 1


def _number(holders: tuple[int, ...], y: int, stripes: int, many: int) -> int:
    """Number in the palette of the pixel `y` (of `stripes`) of a block."""
    if not holders:
        return CLEAR
    if len(holders) > MOST:
        return many
    return min(many, 1 + holders[y * len(holders) // stripes])


def traffic(history: History) -> tuple[list[list[int]], bool]:
    """Point-to-point traffic over the whole run.

    Returns:
        sent[source][target] in bytes; and True where evaluations are included: until version 0.1 the pairs held the
        blocks that were sent to assemble the full network, too.
    """
    sent: Counter[tuple[int, int]] = Counter()
    mixed = False
    workers = max([history.workers, *(len(record["workers"]) for record in history.rounds)])
    for record in history.rounds:
        apart = (*ALLREDUCED, "control", EVALUATE)
        booked = sum(num for traffic_kind, num in record["bytes"].items() if traffic_kind not in apart)
        mixed |= sum(n for _, _, n in record["pairs"]) > booked
        for source, target, num_bytes in record["pairs"]:
            if 0 <= source < workers and 0 <= target < workers:
                sent[source, target] += num_bytes
    return [[sent[a, b] for b in range(workers)] for a in range(workers)], mixed


def all_reduced(history: History) -> float:
    """Bytes that each worker sent in all-reduces, over the whole run."""
    return sum(map(allreduced_bytes, history.rounds)) / history.workers
