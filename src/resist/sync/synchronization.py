"""The synchronization at the end of a round: agree and collect, which change no weights, and exchange."""

from collections.abc import Mapping, Sequence

from resist.planning.plan import Key
from resist.subnet.flats import Flats
from resist.sync.exchange import Exchange
from resist.sync.loose_exchange import LooseExchange
from resist.sync.round_agreement import RoundAgreement, agree_on_round, diverged
from resist.sync.round_end import RoundEnd
from resist.sync.transport import Transport
from resist.sync.worker import Worker


def agree(
    transport: Transport,
    workers: Sequence[Worker],
    end: RoundEnd,
    nonfinite: Mapping[int, str],
    joined: frozenset[int] = frozenset(),
) -> RoundAgreement:
    """Agree on the states to exchange, and on workers with NaN or inf.

    Waits for all processes, and for the device.

    Args:
        transport: Connects the processes.
        workers: The hosted workers.
        end: The end of the round.
        nonfinite: Hosted workers whose round must not count, each with the reason.
        joined: All workers that join at this end of a round.

    Returns:
        What they have agreed on.

    Raises:
        UserError: If a parameter was moved out of the flat tensor, or `nonfinite` has a worker that is not hosted here.
        AgreedError: If the processes do not fit each other.
        WorkerLostError: If another process is lost.
    """
    for worker in workers:
        worker.take_back()
    for worker in workers if end.strategy.optimizer_state == "reset" else ():
        worker.reset_state()
    return agree_on_round(transport, workers, end, nonfinite, joined)


def collect(workers: Sequence[Worker], end: RoundEnd, agreed: RoundAgreement, *, on_nonfinite: str) -> None:
    """Collect the states of the optimizers, unless a worker has diverged.

    Args:
        workers: The hosted workers.
        end: The end of the round.
        agreed: What `agree` has returned.
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
        agreed: What `agree` has returned, after `collect`.
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
