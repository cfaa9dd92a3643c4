"""The full network of a job between two rounds, before its branches are scaled."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from resist.errors import UserError
from resist.planning.plan import RoundPlan
from resist.subnet.network import Subnet
from resist.sync.assembly import assemble
from resist.sync.streaming import mean_of_weights, put_weights
from resist.sync.transport import Transport
from resist.sync.worker import Worker


def full_network(
    transport: Transport, workers: Sequence[Worker], plan: RoundPlan, *, on: Sequence[int], averaged: bool
) -> Subnet | None:
    """Assemble the complete network. Every process has to call it.

    Where workers differ in what they have trained since fragments were averaged, it has their mean.

    Args:
        transport: Connects the workers.
        workers: The hosted workers.
        plan: The present plan.
        on: The workers whose processes assemble it, at most one of each process.
        averaged: Assemble the averages over time, instead of the weights.

    Returns:
        The network, or None if other processes host `on`.

    Raises:
        UserError: If there are no averages.
        WorkerLostError: If another process is lost.
    """
    subnets: dict[int, Subnet] = {}
    for worker in workers:
        if worker.subnet.model.training:  # layers may have been frozen since
            worker.note_modes()
        if (subnet := worker.average if averaged else worker.subnet) is None:
            raise UserError("averaged=True, and there are no averages; give them to job.follow before training")
        subnets[worker.index] = subnet
    means: Mapping[int, Tensor] = {}
    if not averaged and any(worker.apart for worker in workers):
        means = mean_of_weights(transport, workers, blocks=plan.held_by_all)
    full = assemble(transport, subnets, plan=plan, on=on)
    if full is not None and means:
        put_weights(full, next(iter(means.values())), blocks=plan.held_by_all)
    return full
