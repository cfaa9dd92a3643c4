"""Who held what, and who sent to whom: the facts behind the partition map and the matrix of traffic."""

from collections import Counter
from dataclasses import dataclass

from resist.report.colors import color_of
from resist.report.svg import CLEAR
from resist.report.units import sample
from resist.runs.history import History

COLUMNS, CELLS = 400, 40_000  # of a map at most
MOST = 16  # holders of a block that are told apart; more are gray
MANY = "#8d949e"


@dataclass(frozen=True)
class Holdings:
    """Of one chain.

    rounds:  the rounds that are shown; every: one of so many is.
    holders: holders[column][block]: the workers that held the block in that round, ascending.
    shares:  shares[worker][block]: the share of all rounds in which the worker held it.
    """

    chain: str
    blocks: int
    workers: int
    rounds: list[int]
    every: int
    holders: list[list[tuple[int, ...]]]
    shares: list[list[float]]


def holdings(history: History) -> list[Holdings]:
    """The chains of a run, those first that come first in its records."""
    chains = dict.fromkeys(name for record in history.rounds for name in record["plan"])
    return [_of_chain(history, chain) for chain in chains]


def _of_chain(history: History, chain: str) -> Holdings:
    records = [record for record in history.rounds if record["plan"].get(chain)]
    plans = [record["plan"][chain] for record in records]
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
        holders.append([tuple(one) for one in of_block])
    every = kept[1] - kept[0] if len(kept) > 1 else 1
    shares = [[count / len(plans) for count in of_worker] for of_worker in counts]
    return Holdings(chain, blocks, workers, [records[i]["round"] for i in kept], every, holders, shares)


def map_rows(facts: Holdings) -> tuple[list[bytes], list[str], int]:
    """(pixels, palette, pixels of a block's height) of a map: a column for each round, a row for each block.

    A block that several workers held is cut into as many stripes of equal height, in their colors. Blocks are set
    apart by a clear line, and so are rounds where there are few of them.
    """
    most = max((len(one) for column in facts.holders for one in column), default=1)
    stripes = max(min(most, MOST), min(14, max(5, 420 // facts.blocks)))
    palette = [color_of(worker) for worker in range(min(facts.workers, 254))] + [MANY]
    wide = len(facts.holders) <= 60
    rows: list[bytes] = []
    for block in range(facts.blocks):
        cells = [column[block] for column in facts.holders]
        for y in range(stripes):
            numbers = [_number(holders, y, stripes, len(palette)) for holders in cells]
            rows.append(b"".join(bytes([n]) * 11 + bytes([CLEAR]) for n in numbers) if wide else bytes(numbers))
        rows.append(bytes(len(rows[-1])))
    return rows, palette, stripes + 1


def _number(holders: tuple[int, ...], y: int, stripes: int, many: int) -> int:
    """The palette's number of a block's pixel `y` of `stripes`."""
    if not holders:
        return CLEAR
    if len(holders) > MOST:
        return many
    return min(many, 1 + holders[y * len(holders) // stripes])


def traffic(history: History) -> tuple[list[list[int]], bool]:
    """(sent[source][target] in bytes over the whole run, whether evaluations are among it).

    Until version 0.1 the pairs held the blocks that were sent to assemble the full network, too.
    """
    sent: Counter[tuple[int, int]] = Counter()
    mixed = False
    workers = max([history.workers, *(len(record["workers"]) for record in history.rounds)])
    for record in history.rounds:
        booked = sum(record["bytes"].get(kind, 0) for kind in ("blocks", "state"))
        mixed |= sum(n for _, _, n in record["pairs"]) > booked
        for source, target, num_bytes in record["pairs"]:
            if 0 <= source < workers and 0 <= target < workers:
                sent[source, target] += num_bytes
    return [[sent[a, b] for b in range(workers)] for a in range(workers)], mixed


def all_reduced(history: History) -> float:
    """Bytes that each worker sent in all-reduces, over the whole run."""
    total = sum(record["bytes"].get(kind, 0) for record in history.rounds for kind in ("shared", "gradients"))
    return total / history.workers
