"""Tests of the emulated network: interfaces and ledger count the same bytes, and nothing is left behind."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from torch import nn

import namespaces
import own
import wire
import wire_plan
import wire_steps
from resist.planning.wire import Wire

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Blocks of 1.2 MB: small enough for seconds, large enough for headers and barriers to be less than 1 %.
SMALL = ["--rate", "1gbit", "--depths", "1", "1", "9", "1", "--width", "32", "--local-steps", "2", "--rounds", "2"]
SMALL += ["--warm-up", "0"]
SEGMENT = 1 << 16  # of what TCP passes to an interface at once
COMMAND = [sys.executable, str(BENCHMARKS / "wire.py"), *SMALL, "--batch", "1", "--no-record", "--json"]
POLICIES = ["resist,min_depth=0,optimizer_state=reset", "resist,min_depth=5,optimizer_state=travel", "local_sgd"]
FORMATS = [
    "resist,wire=int4,fragments=1,redraw_every=2",
    "local_sgd,optimizer_state=average,fragments=1",
    "diloco,wire=log4/int8/int8",
]
UNEQUAL = {2: "resist,capacities=7/3,optimizer_state=average", 4: "resist,capacities=5/3/2/1,optimizer_state=average"}


@pytest.fixture(scope="module")
def allowed() -> None:
    """Skip where the kernel, the user or the machine does not allow namespaces."""
    try:
        with namespaces.network(2, 1e9):
            pass
    except namespaces.CannotEmulateError as error:
        pytest.skip(str(error))


@pytest.fixture
def running(allowed: None) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run, and wait until its namespaces exist and its hosts work."""
    command = [*COMMAND, "--workers", "2", "--compute-s", "30", "30"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    try:
        while len(inside(process.pid)) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "methods"),
    [
        pytest.param(2, [POLICIES[1], FORMATS[0]], id="few"),
        *(
            pytest.param(
                workers,
                [*POLICIES, UNEQUAL[workers], *FORMATS],
                id=str(workers),
                marks=[pytest.mark.nightly, pytest.mark.timeout(600)],
            )
            for workers in UNEQUAL
        ),
    ],
)
def test_the_ledger_is_the_formula_and_what_the_interfaces_count(
    allowed: None, workers: int, methods: list[str]
) -> None:
    command = [*COMMAND, "--workers", str(workers), "--methods", *methods]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["methods"]
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert row["ledger_bytes"] == row["formula_bytes"], row["method"]
        for sent, headers, ledger in zip(row["wire_bytes"], row["header_bytes"], row["ledger_bytes"], strict=True):
            more = 0.005 * ledger + SEGMENT  # for barriers, and one segment that is sent again
            assert 0 <= sent - headers - ledger <= more, row["method"]
    assert not left(os.getpid())


def host(method: str, undisturbed_s: float, compute_s: float, busy_s: float | None) -> dict[str, object]:
    entry = {
        "compute_s": compute_s,
        "exchange_s": 1.0,
        "sent_bytes": 10,
        "header_bytes": 2,
        "ledger_bytes": 8,
        "formula_bytes": 8,
    }
    return {
        "method": method,
        "rounds": [entry | {"undisturbed_s": undisturbed_s, "busy_s": busy_s, "cpu_s": 0.25}],
    }


def test_a_stall_is_what_a_round_takes_beyond_its_steps() -> None:
    (row,) = wire.collect([[host("a", 0.1, 2.0, 0.11)], [host("a", 0.1, 2.5, 0.12)]], local_steps=20)
    assert (row["stall_s"]["median"], row["slowed_percent"], row["cpu_s"]["median"]) == (1.5, 20.0, 0.5)
    (row,) = wire.collect([[host("a", 0.1, 2.0, None)], [host("a", 0.125, 2.5, None)]], local_steps=20)
    assert (row["stall_s"]["median"], row["slowed_percent"]) == (1.0, None)


def test_steps_are_counted_by_the_method_but_the_last() -> None:
    args = argparse.Namespace(compute_s=[0.001, 0.002], batch=1, num_classes=2)
    calls: list[int] = []

    class Counts:
        name, model, optimizer = "local_sgd", nn.Linear(1, 1), None

        def step(self) -> None:
            calls.append(len(calls))

    method = Counts()
    seconds = wire_steps.Steps(method, args, exchanging=False).run(5, method.step)  # type: ignore[arg-type]
    assert len(calls) == 4
    assert all(one >= 0.002 for one in seconds)


@pytest.mark.slow
def test_a_step_of_a_sub_network_is_a_share_of_one_of_the_full_network() -> None:
    build = partial(wire.build, "preact_resnet101", num_classes=2, depths=(1, 1, 17, 1), width=4)
    assert 0 < wire_steps.compare_steps(build, workers=4, batch=1, num_classes=2, repetitions=1) < 0.9


def test_the_busy_steps_are_those_of_the_fragments() -> None:
    assert own.busy_steps(Wire(fragments=2, delay=2), 10) == {2, 3, 4, 7, 8, 9}
    assert own.busy_steps(Wire(), 10) == frozenset()


def test_the_plan_names_methods_that_exist_and_ends_in_time() -> None:
    lines = wire_plan.plan().splitlines()
    assert sum(int(line.split()[2]) for line in lines if line.startswith("# about")) <= 25 * 60
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert len(commands) == len(wire_plan.COMMANDS)
    for words in commands:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            args = wire.arguments()
        args.width, args.sections = 4, (1, 1, 9, 1)
        wire.check(args.methods, partial(wire.build_network, args), args.workers, args.local_steps)


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGTERM])
def test_interrupted_it_removes_its_namespaces(running: subprocess.Popen[bytes], number: signal.Signals) -> None:
    hosts = inside(running.pid)
    running.send_signal(number)
    assert running.wait() != 0
    assert not left(running.pid)
    assert not any(Path(f"/proc/{pid}").exists() for pid in hosts)


@pytest.mark.slow
def test_what_a_killed_run_leaves_the_next_one_removes(running: subprocess.Popen[bytes]) -> None:
    running.kill()
    running.wait()
    assert left(running.pid)
    with namespaces.network(2, 1e9) as hosts:
        assert not left(running.pid)
        assert [host.namespace for host in hosts] == [f"{namespaces.PREFIX}{os.getpid()}-{n}" for n in range(2)]
    assert not left(os.getpid())


def test_an_exception_inside_removes_the_namespaces(allowed: None) -> None:
    def fail() -> None:
        with namespaces.network(2, 1e9):
            assert left(os.getpid())
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert not left(os.getpid())


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Run wire.py in this process, which has to end with status 2; returns the lines on stderr."""
    monkeypatch.setattr(sys, "argv", [*COMMAND[1:], *arguments])
    with pytest.raises(SystemExit) as ended:
        wire.main()
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "0mbit"], "'0mbit'"),
        (["--rate", "-1gbit"], "-1gbit"),
        (["--rate", "fast"], "'fast'"),
        (["--workers", "1"], "at least 2"),
        (["--methods", "resist,capacities=2/2/2/1"], "hold 7 of the 8 blocks"),
        (["--methods", "gossip"], "'gossip'"),
        (["--methods", "local_sgd,wire=int9"], "int9"),
        (["--methods", "local_sgd,wire=int8/int8"], "wire=int8/int8"),
        (["--methods", "local_sgd,fragments=-1"], "`fragments=-1`"),
        (["--methods", "local_sgd,fragments=2"], "`fragments=2` needs at least 4 steps"),
        (["--methods", "diloco,min_depth=3"], "the options of diloco are wire"),
        (["--compute-s", "1", "1", "--full-step-s", "1"], "not both"),
        (["--compute-s", "0", "1"], "above 0"),
        (["--full-step-s", "0"], "above 0"),
        (["--warm-up", "-1"], "at least 0"),
        (["--methods", "flat,min_depth=3"], "flat"),
        (["--methods", "resist,min_depth=30"], "30` exceeds the 8 blocks"),
        (["--model", "vgg"], "vgg"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    joined = [arguments[0] + "=" + arguments[1]] if arguments[1].startswith("-") else arguments
    (line,) = run_here(monkeypatch, capsys, *joined)
    assert says in line


def test_without_the_tools_it_says_so_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    (line,) = run_here(monkeypatch, capsys)
    assert "iproute2" in line or "root" in line


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(namespaces.CannotEmulateError, match="root"), namespaces.network(2, 1e9):
        pass


def left(pid: int) -> list[str]:
    """Return the namespaces of the run with process `pid`."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"{namespaces.PREFIX}{pid}-")]


def inside(pid: int) -> list[str]:
    """Return the processes in the namespaces of a run."""
    pids: list[str] = []
    for namespace in left(pid):
        pids += subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
    return pids
