"""The synchronization at the end of a round that is agreed on: collect, which changes no weights, and exchange."""

from collections.abc import Sequence

from resist.planning.plan import Key
from resist.subnet.flats import Flats
from resist.sync.exchange import Exchange
from resist.sync.loose_exchange import LooseExchange
from resist.sync.round_agreement import RoundAgreement, diverged
from resist.sync.round_end import RoundEnd
from resist.sync.transport import Transport
from resist.sync.worker import Worker


def collect(workers: Sequence[Worker], end: RoundEnd, agreed: RoundAgreement, *, on_nonfinite: str) -> None:
    """Collect the states of the optimizers, unless a worker has diverged.

    Args:
        workers: The hosted workers.
        end: The end of the round.
        agreed: What `agree_on_round` has returned.
        on_nonfinite: As in `resist.Job`.

    Raises:
        DivergedError: If a worker has diverged, and that is not to be overlooked, or if all have.
    """
    if agreed.nonfinite and (on_nonfinite == "stop" or len(agreed.left_out) == end.plan.workers):
        raise diverged(agreed.nonfinite, round=end.round, step=end.step)
    for worker in workers:
        worker.collect_state(agreed.states, reset=worker.index in agreed.nonfinite)


def exchange(
    transport: Transport, workers: Sequence[Worker], end: RoundEnd, agreed: RoundAgreement, *, replicate: bool
) -> dict[Key, Flats]:
    """Average, hand over, and take the next plan.

    Args:
        transport: Connects the workers.
        workers: The hosted workers.
        end: The end of the round.
        agreed: What `agree_on_round` has returned, after `collect`.
        replicate: Keep replicas; with a single worker there is nobody to keep them.

    Returns:
        The replicas that this process keeps: (chain number, block) -> flat tensor of each dtype.

    Raises:
        WorkerLostError: If another process is lost. The weights are then those of no round.
    """
    both = Exchange(transport, workers, end, agreed, replicate=replicate and transport.num_workers > 1)
    replicas = both.finish()
    LooseExchange(transport, workers, end, agreed, both.schedule).run()
    return replicas
