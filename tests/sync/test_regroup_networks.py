"""Regrouping of what networks and optimizers may have besides weights: counters, state of any form, odd chains."""

import pytest
from torch import nn

from resist.planning.strategy import resist
from resist.sync.local import Local
from saving import OPTIMIZERS, STEPS, Block, Loop, warmed_up
from support import floats


def regrouped(loop: Loop, kept: list[int], *, torn: bool) -> Loop:
    """The loop with some of its workers. Torn: as if another had been lost in an exchange."""
    loop.job.torn = torn
    found = loop.job.regroup(Local(len(kept)), kept=kept)
    assert found.repeated == torn
    loop.own = [loop.own[worker] for worker in kept]
    loop.optimizers = [one for own in loop.own for one in own]
    loop.averages = [loop.averages[worker] for worker in kept] if loop.averages else []
    loop.schedules = []
    return loop


def blocks_of(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(name: str, torn: bool) -> None:
    options = {"replicate": True, "elastic": True, "example": False}
    for policy in ("travel", "average"):
        loop = Loop(warmed_up(policy=policy), OPTIMIZERS[name], averaged=True, options=options).train(3 * STEPS + 1)
        regrouped(loop, [0, 2], torn=torn).train(2 * STEPS)
        regrouped(loop, [1], torn=torn).train(STEPS)
        full = loop.job.full_model()
        assert full is not None
        assert all(bool(tensor.isfinite().all()) for tensor in floats(full).values())
        assert len(blocks_of(full)) == 6


def test_counters_of_lost_blocks_are_those_of_the_initial_network() -> None:
    options = {"replicate": True, "elastic": True, "example": False}
    loop = Loop(resist(3, STEPS, min_depth=0), options=options).train(2 * STEPS)
    lost = set(loop.job.plan.held(1)[0])
    regrouped(loop, [0, 2], torn=False)
    for worker in loop.job.workers:
        held = worker.subnet.held[0]
        for block, module in zip(held, blocks_of(worker.model), strict=True):
            assert int(module.calls) == (0 if block in lost else 2 * STEPS), block
            assert int(module.norm.num_batches_tracked or 0) == (0 if block in lost else 2 * STEPS), block
    assert loop.train(STEPS).job.round == 3
