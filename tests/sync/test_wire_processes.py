"""The number of processes changes nothing, with wire formats and with fragments."""

import time

import pytest
import torch
from torch import Tensor

from pool import Pool
from resist.errors import AgreedError, WorkerLostError
from resist.planning.strategy import resist
from resist.state.names import parameters_by_name
from resist.sync.local import Local
from wired import STEPS, STRATEGIES, Run, adamw, streamed


def trained_by(name: str, wire: str, fragments: int, alone: bool) -> dict[int, dict[str, Tensor]]:
    """Parameters of each hosted worker after some rounds, and their average; as -1 those of the full network.

    Nothing depends on the buffers in training, which are averaged as ever.
    """
    strategy = STRATEGIES[name](STEPS if fragments else 1)
    options: dict[str, object] = {"transport": Local(strategy.workers)} if alone else {}
    if fragments:
        run = streamed(strategy, wire, fragments, **options).train(4 * STEPS + 2)
    else:
        run = Run(strategy, wire, adamw, **options).follow().train(4)
    full = run.job.full_model()
    found = {} if full is None else {-1: {name: p.detach() for name, p in full.named_parameters()}}
    for worker in run.job.workers:
        held, own = run.job.plan.held(worker.index), found.setdefault(worker.index, {})
        names = set(parameters_by_name(worker.subnet, held))
        subnets = {"": worker.subnet} if worker.average is None else {"": worker.subnet, "average of ": worker.average}
        for kind, subnet in subnets.items():
            own |= {f"{kind}{n}": value.clone() for n, value in subnet.state(held).items() if n in names}
    if fragments:
        run.train(3)  # closed with a fragment on its way
    run.job.close()
    return found


def step_unequally(timeout_s: float) -> tuple[str, float]:
    """Synchronize after steps of which only process 0 has made those that begin a mean."""
    run = streamed(resist(2, STEPS), "int8", 2, timeout_s=timeout_s)
    run.train(STEPS - 1 if torch.distributed.get_rank() == 0 else 1)
    start = time.monotonic()
    try:
        run.job.synchronize()
    except (AgreedError, WorkerLostError) as error:
        torch.distributed.destroy_process_group()
        return str(error), time.monotonic() - start
    raise AssertionError("unequal numbers of steps went unnoticed")


@pytest.mark.slow
def test_unequal_numbers_of_steps_end_with_an_error() -> None:
    with Pool() as pool:  # of its own: the group ends
        for text, seconds in pool.run(2, step_unequally, 8.0):
            assert "call job.step equally often" in text
            assert "\n" not in text
            assert seconds < 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wire", "fragments", "processes"),
    [
        ("average", "int8", 0, 3),
        ("switch", "int4", 0, 2),
        ("average", "int8", 2, 3),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (
                ("average", "int8", 0, 2),
                ("switch", "int4", 0, 3),
                ("average", "int8", 2, 2),
                *(("outer", "int6", 0, processes) for processes in (2, 3)),
                *(("switch", "fp32", 2, processes) for processes in (2, 3)),
            )
        ),
    ],
)
def test_several_processes_end_with_the_weights_of_one(
    pool: Pool, name: str, wire: str, fragments: int, processes: int
) -> None:
    """Of each worker in the same bits, if what is sent is encoded."""
    alone = trained_by(name, wire, fragments, alone=True)
    found: dict[int, dict[str, Tensor]] = {}
    for part in pool.run(processes, trained_by, name, wire, fragments, False):
        found |= part
    assert found.keys() == alone.keys()
    for worker, values in alone.items():
        assert found[worker].keys() == values.keys()
        bounds = {"rtol": 1e-4, "atol": 1e-5} if wire == "fp32" or worker == -1 else {"rtol": 0, "atol": 0}
        for key, value in values.items():
            torch.testing.assert_close(found[worker][key], value, **bounds)
