"""Small predictions, whose networks are measured once."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from resist.blocks.chains import Chain, choose_chains
from resist.cost import Link, Report, Row, Speed, predict
from resist.cost.footprint import Network, build_on_meta, measure, sgd
from resist.cost.links import Links
from resist.cost.sizes import sizes_of
from resist.cost.states import StateMeter
from resist.planning.methods import METHODS, build_strategy
from resist.planning.strategy import Strategy
from resist.subnet.tensors import tensors_of
from support import tiny

SMALL = {"batch_size": 4, "image_shape": (3, 8, 8), "rounds": 4}


TINY = build_on_meta(tiny)
(CHAIN,) = choose_chains(TINY)
SIZES = sizes_of(TINY, [CHAIN])
MOMENTUM = StateMeter(sgd).sizes(TINY, [CHAIN], [[1]])

KNOWN: dict[object, Network] = {}


def measure_once(template: nn.Module, chains: Sequence[Chain], blocks: Sequence[int], **options: Any) -> Network:
    """`measure`, which is slow and a function of its arguments, once for each sub-network of these tests."""
    tensors = tuple((name, t.shape, t.dtype, t.requires_grad) for name, t in tensors_of(template).items())
    key = (type(template), tensors, tuple(c.name for c in chains), tuple(blocks), *sorted(options.items()))
    if key not in KNOWN:
        KNOWN[key] = measure(template, chains, blocks, **options)
    return KNOWN[key]


def all_of(workers: Iterable[int], names: Iterable[str] = tuple(METHODS), local_steps: int = 50) -> list[Strategy]:
    """A strategy of each method for each number of workers."""
    return [build_strategy(name, number, local_steps) for number in workers for name in names]


def row(report: Report, strategy: str, workers: int) -> Row:
    return next(one for one in report.rows if (one.strategy, one.workers) == (strategy, workers))


def timed(
    strategies: Sequence[Strategy], link: Link | Links, speed: Speed | Sequence[Speed], batchnorm: str = "recalibrate"
) -> Report:
    return predict(tiny, strategies, link=link, speed=speed, batchnorm=batchnorm, **SMALL)
