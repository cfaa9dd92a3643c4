"""The full network for a framework: on every process to be tested, and without hooks to be saved."""

import logging
from collections.abc import Callable, Iterable

from torch import nn

from resist.errors import UserError
from resist.export import fold_scale, scales_of
from resist.job import Job
from resist.subnet.batchnorm import has_running_statistics

log = logging.getLogger(__name__)
Batches = Callable[[], Iterable[object]]  # makes the training batches, once for each estimate of BatchNorm statistics


def assemble(job: Job, batches: Batches | None, *, everywhere: bool = False) -> nn.Module | None:
    """Assemble the full network; ends the round. Every process has to call it.

    Args:
        job: The job; this process hosts one worker.
        batches: Makes the batches for `Job.full_model`.
        everywhere: In every process, one after another, instead of that of worker 0 alone.

    Returns:
        The network; None in the other processes.

    Raises:
        UserError: There are no batches, and the network has BatchNorm statistics to be estimated on them.
    """
    if batches is None and job.batchnorm == "recalibrate" and has_running_statistics(job.workers[0].model):
        raise UserError(
            "the statistics of the full network's BatchNorm are estimated on training batches; give the callback "
            "`batches=lambda: ...`, or Job batchnorm='average'"
        )
    own = None
    for worker in range(job.strategy.workers if everywhere else 1):
        full = job.full_model(None if batches is None else batches(), on=worker)
        own = own if full is None else full
    return own


def plain(full: nn.Module, batches: Batches | None) -> tuple[nn.Module, dict[str, float]]:
    """Fold the scale of a full network into its weights, where that is possible.

    Args:
        full: The full network, whose blocks are scaled by hooks.
        batches: Makes batches that the network takes.

    Returns:
        The network whose state dict is to be saved, and the scales that it does not contain, by name of the block:
        `resist.export.scale_blocks` applies them after loading. Logged once where there are some.
    """
    scales, reason = scales_of(full), "there are no batches to find the last linear operation of each block"
    if not scales:
        return full, {}
    example = None if batches is None else next(iter(batches()), None)
    example = example[0] if isinstance(example, list | tuple) and example else example
    if example is not None:
        try:
            return fold_scale(full, example), {}
        except UserError as error:
            reason = str(error)
    log.warning(
        "the scale of %d blocks is saved beside the weights (resist.export.scale_blocks): %s", len(scales), reason
    )
    return full, scales
