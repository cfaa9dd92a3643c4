"""Memory: what is predicted is what the allocator hands out."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cost_cases import SMALL
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from resist.blocks.chains import choose_chains
from resist.cost import predict
from resist.cost.footprint import LiveBytes, build_on_meta, measure
from resist.cost.states import StateMeter
from resist.job import Job
from resist.models import PreActResNet
from resist.planning.strategy import ddp, diloco, local_sgd, resist
from resist.sync.averaging import VELOCITY
from support import local_step, make, tiny


def measured_peak(blocks: int, batch: int, optimizer_name: str) -> int:
    """Bytes at the peak of the third training step of a worker that holds `blocks` of 8 blocks, from the allocator's
    record of what it handed out."""
    job = Job(small, resist(8, 10, min_depth=blocks))
    worker = job.workers[0]
    optimizer = OPTIMIZERS[optimizer_name](worker.model.parameters())
    images, labels = torch.randn(batch, 3, 16, 16), torch.zeros(batch, dtype=torch.int64)

    def step() -> None:
        F.cross_entropy(worker.model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    live = peak = sum(t.untyped_storage().nbytes() for t in (worker.subnet.flat, images, labels, *states))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def small() -> PreActResNet:
    return PreActResNet((1, 1, 9, 1), 10, width=16)


def momentum(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=0.001)


CASES = [(1, 2, "adam"), (3, 32, "momentum"), (8, 2, "adam"), (8, 32, "momentum"), (8, 32, "adam")]
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {"momentum": momentum, "adam": adam}
MEASURE = "import json, test_footprint as t; print(json.dumps([t.measured_peak(*case) for case in t.CASES]))"


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[int, int, str], int]:
    """What `measured_peak` finds with the kernels of a run, which conftest.py does not allow."""
    if not re.search(r"\bavx512f\b", Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""):
        pytest.skip("older kernels allocate memory internally")
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_is_what_the_allocator_hands_out(
    peaks: dict[tuple[int, int, str], int], case: tuple[int, int, str]
) -> None:
    template, (blocks, batch, name) = build_on_meta(small), case
    network = measure(
        template, choose_chains(template), (blocks,),
        batch_size=batch, image_shape=(3, 16, 16), build_optimizer=OPTIMIZERS[name],
    )  # fmt: skip
    assert network.memory.peak == pytest.approx(peaks[case], rel=0.1)


@pytest.mark.slow
def test_memory_has_its_parts() -> None:
    template = build_on_meta(small)
    one, two = (
        measure(template, choose_chains(template), (8,), batch_size=4, image_shape=(3, 8, 8), build_optimizer=build)
        for build in (momentum, adam)
    )
    weights = sum(p.numel() * 4 for p in small().parameters())
    assert one.memory.gradients == one.memory.optimizer == weights
    assert two.memory.optimizer == pytest.approx(2 * weights, rel=0.01)  # and Adam's counts of steps
    assert one.memory.activations == two.memory.activations
    assert one.memory.peak < one.memory.weights + 2 * weights + one.memory.activations + weights


def factored(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adafactor(parameters)


class WideState(torch.optim.SGD):
    """An optimizer that keeps its state in single precision, whatever the weights are."""

    def step(self, closure: object = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["wide"] = torch.zeros_like(parameter, dtype=torch.float32)


@pytest.mark.parametrize("build_optimizer", [momentum, adam, factored, WideState])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_has_the_bytes_of_a_real_step(
    build_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer], dtype: torch.dtype
) -> None:
    """Also where it is factored, of another dtype than the weights, or read in the optimizer's step."""
    model = small().to(dtype)
    predicted = StateMeter(build_optimizer).num_bytes(model.to("meta").parameters())
    model = small().to(dtype)
    optimizer = build_optimizer(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert predicted == sum(value.nbytes for value in values)


@pytest.mark.slow
def test_an_average_of_the_weights_is_counted() -> None:
    plain, averaged = (
        predict(tiny, [resist(2), ddp(2)], build_optimizer=factored, average=average, **SMALL).rows
        for average in (False, True)
    )
    for one, two in zip(plain, averaged, strict=True):
        before, after = one.networks[0].memory, two.networks[0].memory
        assert after.peak - before.peak == after.average == before.weights
        assert 0 < before.optimizer < before.weights  # factored
    assert averaged[0].traffic.bytes["state"] > plain[0].traffic.bytes["state"]
    assert averaged[1].traffic == plain[1].traffic  # DDP's averages are equal in all workers


def test_live_bytes_follow_storages() -> None:
    with LiveBytes() as tracker:
        one = torch.zeros(1000)
        view = one.view(10, 100)[2:]
        two = one + 1
        del one
        assert (tracker.live, tracker.peak) == (8000, 8000)  # the view holds the first storage
        del view, two
    assert (tracker.live, tracker.peak) == (0, 8000)


def test_what_ddp_and_diloco_hold_besides() -> None:
    """DDP sends from a second copy of the gradients; DiLoCo keeps the round's first weights, and a velocity."""
    report = predict(tiny, [local_sgd(2), ddp(2), diloco(2)], **SMALL)
    plain, with_ddp, outer = (one.networks[0].memory for one in report.rows)
    job, optimizers = make(diloco(2, 1))
    local_step(job, optimizers)
    job.step(*optimizers)
    start = job.workers[0].anchor
    assert start is not None
    kept = sum(t.nbytes for t in (*start.values(), *job.workers[0].state[VELOCITY].values()))
    assert with_ddp.peak - plain.peak == with_ddp.buckets == plain.gradients
    assert outer.peak - plain.peak == outer.outer == pytest.approx(kept, rel=0.01)
    in_json = {one["strategy"]: one["networks"][0]["memory_bytes"] for one in report.to_json()["strategies"]}
    assert (in_json["ddp"]["buckets"], in_json["diloco"]["outer"]) == (with_ddp.buckets, outer.outer)
