"""`fragments=auto`: the number of fragments and their delay, from the first rounds of a run."""

import logging
from dataclasses import replace

import torch

from resist.cost.overlap import choose_fragments
from resist.job import Job
from resist.planning.wire import Wire
from resist.report.units import amount, duration
from resist.runs.config import TrainConfig

log = logging.getLogger(__name__)


def take_up_fragments(
    config: TrainConfig, job: Job, *, rounds: int, step_s: float, exchange_s: float, exchange_bytes: float
) -> TrainConfig:
    """Choose fragments for a job between two rounds, which goes on with them.

    Every process has to call it with the same measurements, which it takes from no other place.

    Args:
        config: The options.
        job: The job, which has averaged nothing in fragments yet.
        rounds: Rounds of the run; what is averaged in the last one is to be hidden.
        step_s: Seconds of a step in the slowest process.
        exchange_s: Seconds of a synchronization.
        exchange_bytes: Bytes that all workers have sent in it.

    Returns:
        The options, with the choice in the place of "auto".
    """
    workers, wire = job.strategy.workers, job.wire
    if job.transport.num_processes > 1:  # else nothing is sent
        wire = choose_fragments(
            wire,
            _numbers(job, rounds),
            workers=workers,
            local_steps=config.method.local_steps,
            step_s=step_s,
            exchange_s=exchange_s,
            exchange_bytes=exchange_bytes / workers,
        )
    if wire.fragments:
        job.wire = wire
        job.mark_anchors()
    if 0 in job.transport.hosted:
        log.info("fragments: %s", _reason(wire, step_s, exchange_s, exchange_bytes))
    return replace(config, method=replace(config.method, fragments=wire.fragments, delay=wire.delay))


def _numbers(job: Job, rounds: int) -> int:
    """Numbers in single precision that all workers average in the last round."""
    layout = job.workers[0].subnet.layouts.get(torch.float32)
    if layout is None:
        return 0
    numel = layout.shared.num_trained
    if job.plan_of(max(rounds - 1, 0)).held_by_all:
        numel += sum(c.num_blocks * block.num_trained for c, block in zip(job.chains, layout.blocks, strict=True))
    return numel


def _reason(wire: Wire, step_s: float, exchange_s: float, exchange_bytes: float) -> str:
    measured = f"measured: {duration(step_s)} a step, {duration(exchange_s)} to exchange {amount(exchange_bytes)}"
    late = f", each finished {wire.delay} step{'s' * (wire.delay > 1)} after it begins" if wire.fragments else ""
    return f"{wire.fragments or 'none'}{late}; {measured}"
