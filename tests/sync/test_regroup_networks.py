"""Regrouping of what networks and optimizers may have besides weights: counters, state of any form, odd chains."""

import pytest
from torch import nn

from resist.planning.strategy import resist
from resist.sync.local import Local
from saving import OPTIMIZERS, STEPS, Block, Loop, equal, warmed_up
from support import floats

OPTIONS = {"replicate": True, "elastic": True, "example": False}


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


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(name: str) -> None:
    for policy, torn in (("travel", False), ("average", True)):
        loop = Loop(warmed_up(policy=policy), OPTIMIZERS[name], averaged=True, options=OPTIONS).train(3 * STEPS + 1)
        regrouped(loop, [0, 2], torn=torn).train(2 * STEPS)
        regrouped(loop, [1], torn=torn).train(STEPS)
        full = loop.job.full_model()
        assert full is not None
        assert all(bool(tensor.isfinite().all()) for tensor in floats(full).values())
        assert len(blocks_of(full)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad", "adafactor", "two", "python"])
def test_with_the_same_members_it_is_a_synchronization_bit_for_bit(name: str) -> None:
    for policy, rounds in (("travel", 3), ("average", 3), ("travel", 0), ("reset", 1), ("keep", 1)):
        loops = [
            Loop(warmed_up(policy=policy), OPTIMIZERS[name], averaged=True, options=OPTIONS).train(rounds * STEPS + 1)
            for _ in range(2)
        ]
        loops[0].job.synchronize()
        regrouped(loops[1], [0, 1, 2], torn=False)
        loops[0].schedules = []
        assert equal(loops[0].everything(), loops[1].everything()), policy
        for loop in loops:
            loop.train(STEPS)
        assert equal(loops[0].everything(), loops[1].everything()), policy


@pytest.mark.parametrize("torn", [False, True])
def test_counters_of_lost_blocks_are_those_of_the_initial_network(torn: bool) -> None:
    """Where a round is repeated, the others are as in its beginning."""
    loop = Loop(resist(3, STEPS, min_depth=0), options=OPTIONS).train(2 * STEPS + torn)
    lost = set(loop.job.plan.held(1)[0])
    regrouped(loop, [0, 2], torn=torn)
    for worker in loop.job.workers:
        held = worker.subnet.held[0]
        for block, module in zip(held, blocks_of(worker.model), strict=True):
            assert int(module.calls) == (0 if block in lost else 2 * STEPS), block
            assert int(module.norm.num_batches_tracked or 0) == (0 if block in lost else 2 * STEPS), block
    assert loop.train(STEPS).job.round == 3
