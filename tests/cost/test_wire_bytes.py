"""Predicted bytes are those that a job counts, for each wire format, policy of the optimizer's state and number of
workers; and what `resist cost` and `resist plan` say of a format.
"""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from resist.blocks.chains import choose_chains
from resist.cli import main
from resist.cost.footprint import build_on_meta
from resist.cost.options import change_bytes
from resist.cost.sizes import Sizes, StateSizes, sizes_of
from resist.cost.states import StateMeter
from resist.cost.traffic import round_traffic
from resist.job import Job
from resist.models import PreActResNet
from resist.planning.strategy import Strategy, diloco, local_sgd, resist
from resist.planning.wire import WIRES, Wire

STEPS = 4
# Of the optimizer's state, as far as they differ in what is sent.
POLICIES = {
    "unequal": ("reset", "keep", "travel", "average"),
    "local_sgd": ("travel", "average"),
    "diloco": ("keep",),
}
STRATEGIES = {
    "unequal": lambda workers, policy: resist(
        workers, STEPS, capacities=(4, 3, 2, 2)[:workers], optimizer_state=policy
    ),
    "local_sgd": lambda workers, policy: local_sgd(workers, STEPS, optimizer_state=policy),
    "diloco": lambda workers, policy: diloco(workers, STEPS),
}
FRAGMENTS = [Wire("int4", "int8", "int8", fragments=2), Wire(fragments=2)]
MIXED = [*FRAGMENTS, Wire("log4", "int6", "fp32"), Wire("int8", "fp32", "bf16"), Wire("fp32", "int8", "int8")]


def network() -> nn.Module:
    return PreActResNet((1, 1, 5, 1), 3, width=4)


TEMPLATE = build_on_meta(network)


@cache
def sizes_with_state(held: tuple[tuple[int, ...], ...]) -> tuple[Sizes, StateSizes]:
    chains = choose_chains(TEMPLATE)
    meter = StateMeter(lambda parameters: torch.optim.AdamW(nn.ParameterList(parameters), lr=1e-3))
    return sizes_of(TEMPLATE, chains), meter.sizes(TEMPLATE, chains, held)


def check(strategy: Strategy, wire: str | Wire) -> None:
    job = Job(network, strategy, wire=wire, example=False, batchnorm="average")
    optimizers = [torch.optim.AdamW(worker.model.parameters(), lr=1e-3) for worker in job.workers]
    sizes, state = sizes_with_state(tuple(job.plan.capacities(worker) for worker in range(strategy.workers)))
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        worker.model(torch.ones(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    job.transport.take()
    for _ in range(STEPS):
        job.step(*optimizers)
    expected = round_traffic(sizes, job.plan_of(0), job.plan_of(1), strategy=strategy, state=state, wire=job.wire)
    assert +Counter(job.transport.bytes) == +Counter(expected.bytes), (strategy.name, wire)


@pytest.mark.parametrize("policy", ["reset", pytest.param("average", marks=pytest.mark.slow)])
def test_predicted_bytes_are_those_counted_with_two_workers(policy: str) -> None:
    for wire in ("int8", FRAGMENTS[0]):
        check(STRATEGIES["unequal"](2, policy), wire)


DAILY = {"unequal": 3, "local_sgd": 2, "diloco": 3}  # number of workers


@pytest.mark.slow
@pytest.mark.parametrize("name", DAILY)
def test_predicted_bytes_are_those_counted(name: str) -> None:
    """Of each wire with one policy."""
    policies = POLICIES[name]
    for number, wire in enumerate((*WIRES, *MIXED)):
        check(STRATEGIES[name](DAILY[name], policies[number % len(policies)]), wire)


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("name", STRATEGIES)
def test_predicted_bytes_are_those_counted_with_each_policy(name: str, workers: int) -> None:
    for policy in POLICIES[name]:
        for wire in (*WIRES, *MIXED):
            check(STRATEGIES[name](workers, policy), wire)


def kept(job: Job) -> int:
    """Bytes of the first worker's anchors and errors, without views of weights that other options keep."""
    worker, found = job.workers[0], 0
    others = {flat.untyped_storage().data_ptr() for flat in (worker.anchor or {}).values()}
    for fragment in worker.fragments:
        feedback = fragment.feedback
        tensors = (feedback.anchor, feedback.error, feedback.piece_error)
        found += sum(t.nbytes for t in tensors if t is not None and t.untyped_storage().data_ptr() not in others)
    return found


@pytest.mark.parametrize("wire", [WIRES["fp32"], WIRES["bf16"], WIRES["int8"], *FRAGMENTS], ids=str)
@pytest.mark.parametrize("name", ["unequal", "diloco"])
def test_predicted_memory_of_changes_is_what_a_job_keeps(name: str, wire: Wire) -> None:
    job = Job(network, STRATEGIES[name](2, "keep"), wire=wire, example=False, batchnorm="average")
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.1) for worker in job.workers]
    for _ in range(STEPS + 2):
        job.step(*optimizers)
    sizes = sizes_of(TEMPLATE, job.chains)
    part = sizes.shared if name == "unequal" else sizes.whole()
    predicted = change_bytes(part, wire, 2)
    on_its_way = 0
    if wire.fragments:
        encoded = max(part.fragment_bytes(wire.shared, wire.fragments))
        numbers = max(fragment.feedback.anchor.nbytes for fragment in job.workers[0].fragments)
        on_its_way = numbers + (2 if wire.shared != "fp32" else 1) * encoded
    assert predicted == kept(job) + on_its_way
    assert (predicted > 0) == (wire != Wire())


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--data", "digits", "--model-args", "depths=1,1,7,1", "width=4"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    return out


def test_plan_shows_the_bytes_of_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, dict[str, int]] = {}
    for wire in ("fp32", "int8"):
        text = printed(capsys, "plan", "--workers", "2", "--rounds", "2", "--wire", wire)
        assert re.search(r"weights sent by all, mean of 2 rounds +[\d.]+ kB shared \+ [\d.]+ kB blocks", text)
        content = json.loads(printed(capsys, "plan", "--workers", "2", "--rounds", "2", "--wire", wire, "--json"))
        assert [entry["after_round"] for entry in content["wire"]["sent"]] == [1, 2]
        found[wire] = content["wire"]["sent"][0]["bytes"]
        assert content["wire"]["formats"]["shared"] == wire
        assert content["wire"]["bytes_of_a_block"].keys() == {"layer3:1-6"}
    assert found["int8"]["shared"] < 0.5 * found["fp32"]["shared"]
    assert found["int8"]["blocks"] < 0.6 * found["fp32"]["blocks"]
    assert json.loads(printed(capsys, "plan", "--strategy", "ddp", "--json"))["wire"] is None


def test_means_are_of_whole_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Between two draws no block of a single holder is sent: a mean over a part of them is of no run."""
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"method": {"redraw_every": 4, "workers": 2, "min_depth": 0}}))
    sent = json.loads(printed(capsys, "plan", "--config", str(file), "--json"))["wire"]["sent"]
    assert [entry["after_round"] for entry in sent if entry["bytes"]["blocks"]] == [4]
    assert "mean of 4 rounds" in printed(capsys, "plan", "--config", str(file))
    predicted = json.loads(printed(capsys, "cost", "--config", str(file), "--strategies", "resist", "--json"))
    assert predicted["rounds"] == 52


@pytest.mark.slow
def test_cost_takes_formats_of_parts_and_measured_links(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    file, links = tmp_path / "options.json", tmp_path / "links.json"
    file.write_text('{"method": {"wire_parts": ["shared=log4"]}}')
    one = {"host": "a", "out_gbit_s": 0.1, "in_gbit_s": 0.1, "latency_ms": 1}
    links.write_text(json.dumps({"format": "resist probe 1", "links": [one, one, one], "to_all_share": 1}))
    arguments = ["cost", "--strategies", "resist", "--batch-size", "2", "--json"]
    plain = json.loads(printed(capsys, *arguments, "--workers", "3"))["strategies"]
    short = json.loads(printed(capsys, *arguments, "--config", str(file), "--link-file", str(links), "--images-s", "9"))
    (row,) = short["strategies"]
    assert row["workers"] == 3  # as many as there are links
    assert row["bytes"]["shared"] < 0.4 * plain[0]["bytes"]["shared"]
    assert row["bytes"]["blocks"] == plain[0]["bytes"]["blocks"]
    assert row["seconds"]["stall"] == pytest.approx(row["seconds"]["exchange"] / row["seconds"]["round"])
    assert [link["latency_ms"] for link in short["links"]["each"]] == [1, 1, 1]
