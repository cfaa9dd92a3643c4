"""The command line as people use it. In-process where that is enough, real processes where it is not."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import Commands, free_port
from resist.cli import main
from resist.runs.directory import Run

SMALL = [
    "--workers", "4", "--min-depth", "0", "--model-args", "depths=1,1,5,1", "width=4", "--batch-size", "32",
    "--local-steps", "3", "--epochs", "0.2", "--num-evals", "2", "--device", "cpu",
]  # fmt: skip
FAST = [*SMALL, "--batchnorm", "average"]  # nothing is estimated again for a test
HOST = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}  # one process on each of two hosts


def resist(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def accuracies(path: Path) -> list[float | None]:
    return [json.loads(line)["accuracy"] for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_train_then_evaluate_in_one_process(capsys, tmp_path) -> None:
    out = tmp_path / "run"
    status, text, _ = resist(capsys, "train", *SMALL, "--processes", "1", "--out", str(out))
    assert status == 0
    assert "test accuracy" in text
    for name in ("config.json", "environment.json", "metrics.jsonl", "model.safetensors"):
        assert (out / name).is_file()
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rounds] == [1, 2, 3]
    assert rounds[-1]["step"] == 9  # 0.2 of 1,437 images in batches of 32
    assert [r["accuracy"] is not None for r in rounds] == [False, True, True]
    assert rounds[0]["plan"] != rounds[1]["plan"]
    assert sum(rounds[0]["bytes"].values()) > 0
    status, text, _ = resist(capsys, "evaluate", str(out), "--device", "cpu")
    assert status == 0
    assert text == f"test accuracy {100 * rounds[-1]['accuracy']:.2f} %\n"


def count_opening() -> None:
    """A prelude: print a line for every time that data are opened."""
    import resist.training.train as module

    def opened(*arguments, _open=module.open_task, **options):
        print("the data are opened", flush=True)
        return _open(*arguments, **options)

    module.open_task = opened


@pytest.fixture(scope="module")
def forked(_commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that resist forks; they share the data that the launcher has opened."""
    out = tmp_path_factory.mktemp("forked") / "run"
    done = _commands.run("train", *FAST, "--processes", "2", "--out", out, prelude=count_opening)
    assert (done.returncode, done.stderr) == (0, "")
    assert sys.platform != "linux" or done.stdout.count("the data are opened") == 1
    return out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_processes_however_they_start_give_the_same_run(capsys, commands: Commands, forked: Path, tmp_path) -> None:
    """One process, four that resist forks, two that are started as torchrun does: up to summation order the same."""
    status, _, _ = resist(capsys, "train", *FAST, "--processes", "1", "--out", str(tmp_path / "one"))
    assert status == 0
    done = commands.run("train", *FAST, "--processes", "4", "--out", tmp_path / "four")
    assert (done.returncode, done.stderr) == (0, "")
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        commands.start("train", *FAST, "--out", tmp_path / "two", env=group | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    assert [(one.communicate()[1], one.returncode) for one in started] == [("", 0)] * 2
    for name in ("two", "four"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    check_equal(tmp_path / "two", forked)


@pytest.mark.nightly
def test_torchrun_gives_the_run_that_resist_starts(forked: Path, tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = run(*torchrun, "-m", "resist", "train", *FAST, "--out", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    check_equal(tmp_path / "two", forked)


def check_equal(out: Path, other: Path) -> None:
    """Compare the losses and weights of two runs bit for bit."""
    assert losses(out) == losses(other)
    weights = [load_file(path / "model.safetensors") for path in (out, other)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


@pytest.mark.slow
def test_a_run_ends_early_when_its_budget_is_used_up(capsys, tmp_path) -> None:
    budgets = {"gb=0.0000001": 2, "seconds=0.000001": 1, "accuracy=0.0001": 3, "rounds=2": 2, "gb=9": 3}
    for budget, rounds in budgets.items():
        out = tmp_path / budget
        status, _, _ = resist(capsys, "train", *FAST, "--processes", "1", "--until", budget, "--out", str(out))
        assert status == 0
        found = accuracies(out)
        assert len(found) == rounds
        assert found[-1] is not None
        assert (out / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_budget_of_bytes_counts_what_is_on_the_wire(capsys, tmp_path) -> None:
    """A budget a little above the first round of int8 is used up by the first round of fp32, and not by its own."""

    def sent(wire: str, budget: float) -> list[int]:
        out = tmp_path / f"{wire} {budget}"
        options = ["--wire", wire, "--until", f"gb={budget}", "--out", str(out)]
        status, text, _ = resist(capsys, "train", *FAST, "--processes", "1", *options)
        assert status == 0
        assert ("by all workers (int8); local SGD" in text) == (wire == "int8")
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [sum(n for kind, n in r["bytes"].items() if kind != "evaluate") for r in records]

    first, *others = sent("int8", 9.0)
    assert len(others) == 2
    assert len(sent("int8", (first + 1000) / 1e9)) == 3
    assert len(sent("fp32", (first + 1000) / 1e9)) == 2
    assert len(sent("int8", first / 1e9)) == 2


@pytest.mark.slow
def test_plan_names_the_papers_counts(capsys) -> None:
    arguments = ["plan", "--model", "preact_resnet101", "--num-classes", "100", "--workers", "4"]
    status, text, _ = resist(capsys, *arguments)
    assert status == 0
    for number in ("41,396,900", "15,422,116", "22 blocks of 1,180,672", "6 6 6 6"):
        assert number in text
    _, text, _ = resist(capsys, *arguments, "--json", "--rounds", "5")
    facts = json.loads(text)
    assert (facts["parameters"], facts["shared"]) == (41396900, 15422116)
    assert len(facts["rounds"]) == 5
    for number, entry in enumerate(facts["rounds"], start=1):
        assert entry["round"] == number
        assert set().union(*map(set, entry["plan"]["layer3:1-22"])) == set(range(22))


def test_plan_depends_on_the_seed(capsys) -> None:
    arguments = ["plan", "--model-args", "depths=1,1,9,1", "width=4", "--workers", "4", "--json"]
    first, again, other = (resist(capsys, *arguments, "--seed", seed)[1] for seed in ("0", "0", "1"))
    assert json.loads(first) == json.loads(again)
    assert json.loads(first)["rounds"] != json.loads(other)["rounds"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "resnet9"], "--model resnet9 is not known; choose one of"),
        (["--data", "mnist"], "--data mnist is not known; choose one of digits"),
        (["--chain", "layer9:1-2"], "chain 'layer9:1-2'"),
        (["--chain", "layer3:0-3"], "chain 'layer3:0-3': blocks 0 and 1 of layer3 differ in parameter"),
        (["--chain", "layer3:x"], "does not have the form NAME:FIRST-LAST"),
        (["--chain", "all", "layer3"], "--chain all takes all chains that there are; give it alone, or name the"),
        (["--min-depth", "30"], "--min-depth 30 exceeds the 8 blocks of chain layer3:1-8; lower it or add chains"),
        (["--capacities", "1", "1", "1", "1"], "--capacities 1 1 1 1 hold 4 of the 8 blocks"),
        (["--model-args", "depths=1,1"], "--model-args depths=1,1; give four numbers"),
        (["--model-args", "depths=1,1,1,1"], "the model has no chain"),
        (["--processes", "9"], "--processes 9 exceeds --workers 4"),
        (["--lr", "-1"], "--lr -1 is too small"),
        (["--batch-size", "5000", "--processes", "1"], "--batch-size 5000 is outside 1 to 1437"),
        (["--device", "tpu"], "--device 'tpu' is not one of auto, cpu, cuda"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(capsys, tmp_path, arguments: list[str], text: str) -> None:
    out = tmp_path / "run"
    status, _, err = resist(capsys, "train", *arguments, "--out", str(out))
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("resist: ")
    assert text in err
    assert not out.exists()


@pytest.mark.slow
def test_cost_prints_the_papers_first_table(capsys) -> None:
    """The other numbers of workers are in test_predict."""
    network = ["--model", "preact_resnet101", "--num-classes", "100", "--image-size", "32"]
    arguments = ["cost", *network, "--batch-size", "2", "--workers", "4"]
    status, text, _ = resist(capsys, *arguments, "--link-gbit-s", "1", "--images-s", "1000")
    assert status == 0
    assert re.findall(r"^(resist|local_sgd) +4 +(\d\.\d{3}) +\d\.\d{3} ", text, re.M) == [
        ("resist", "0.720"), ("local_sgd", "1.325")
    ]  # fmt: skip
    assert "4 workers: resist is fastest per image" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--link-gbit-s", "0", "--images-s", "5"], "--link-gbit-s 0; must be at least 1e-09 Gbit/s"),
        (["--link-gbit-s", "-1", "--images-s", "5"], "--link-gbit-s -1; must be at least 1e-09 Gbit/s"),
        (["--link-gbit-s", "1", "--images-s", "0"], "--images-s 0"),
        (["--link-gbit-s", "1"], "seconds need both"),
        (["--images-s", "1"], "seconds need both"),
        (["--latency-ms", "1"], "has no effect without --link-gbit-s"),
        (["--min-depth", "9"], "--min-depth 9 exceeds the 8 blocks"),
        (["--workers", "0"], "--workers 0; must be at least 1"),
        (["--model-args", "depths=1,1,1,1"], "the model has no chain"),
        (["--strategies", "magic"], "strategy 'magic' is not one of resist, local_sgd, diloco, ddp"),
        (["--strategies", "ddp", "--min-depth", "2"], "--min-depth has no effect without strategy resist"),
        (["--workers", "2", "--capacities", "3", "3", "3"], "--capacities 3 3 3 has 3 values for --workers 2"),
        (["--fragments", "auto"], "--fragments auto is chosen in a run, from what it measures; give numbers"),
        (["--capacities", "auto"], "--capacities auto is chosen in a run, from what it measures; give numbers"),
    ],
)
def test_cost_refuses_in_one_line(capsys, arguments: list[str], text: str) -> None:
    status, _, err = resist(capsys, "cost", "--model-args", "width=4", "--batch-size", "2", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert text in err


def test_missing_data_says_where_files_belong(capsys, tmp_path, monkeypatch) -> None:
    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    status, _, err = resist(
        capsys, "train", "--data", "cifar10", "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "run")
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "cifar-10-batches-py" in err


def test_an_existing_run_is_left_alone(capsys, tmp_path) -> None:
    (tmp_path / "precious").write_text("x")
    status, _, err = resist(capsys, "train", "--out", str(tmp_path))
    assert status == 2
    assert "never overwritten" in err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs a file system that nobody may write to")
def test_an_out_that_cannot_be_written(capsys) -> None:
    status, _, err = resist(capsys, "train", "--processes", "1", "--out", "/proc/run")
    assert (status, err.count("\n")) == (2, 1)
    assert "/proc/run" in err


@pytest.mark.parametrize("name", ["run", "RUN"])  # the second is the name of the argument
def test_evaluate_refuses_what_is_no_run(capsys, tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = resist(capsys, "evaluate", name)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{name} is not a run directory" in err


def test_training_that_diverges_says_so(capsys, tmp_path) -> None:
    status, _, err = resist(capsys, "train", *FAST, "--processes", "1", "--lr", "1e20", "--out", str(tmp_path / "run"))
    assert (status, err.count("\n")) == (2, 1)
    assert "lower the learning rate" in err


@pytest.mark.slow
def test_hosts_with_different_arguments_are_told_apart(commands: Commands, tmp_path) -> None:
    """Two processes started by hand, as on two hosts: they name the difference at once instead of hanging."""
    for different in (["--lr", "0.5"], ["--workers", "1", "--min-depth", "5"]):
        port = free_port()
        processes = [
            commands.start("train", *FAST, *extra, "--out", tmp_path / "run",
                           env={**HOST, "RANK": str(rank), "MASTER_PORT": port})
            for rank, extra in enumerate(([], different))
        ]  # fmt: skip
        errors = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [2, 2]
        assert different[0].strip("-").replace("-", "_") in errors[0].replace("-", "_")
        assert errors[0].count("\n") == 1


@pytest.mark.slow
def test_a_port_in_use_is_named(commands: Commands) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = commands.run("train", *FAST, env={**HOST, "RANK": "0", "MASTER_PORT": port})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert port in done.stderr


def test_a_run_that_has_ended_at_a_limit_is_not_extended(capsys, tmp_path: Path) -> None:
    out = tmp_path / "a"
    status, _, err = resist(capsys, "train", *FAST, "--processes", "1", "--until", "rounds=1", "--out", str(out))
    assert (status, err) == (0, "")
    files = {name: (out / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors", "state.json")}
    for processes in ("1", "2"):  # in the launcher, and in the process that trains
        status, text, err = resist(capsys, "train", "--resume", str(out), "--processes", processes)
        assert (status, err) == (0, "")
        assert f"the run has ended after round 1; its network is {out}" in text
    assert {name: (out / name).read_bytes() for name in files} == files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "rounds"),
    [([], 3), (["--until", "rounds=2"], 2), (["--optimizer", "adamw", "--model-ema-decay", "0.5"], 3)],
    ids=["steps", "limit", "average"],
)
def test_a_run_that_a_signal_ends_in_its_last_round_is_tested_when_it_resumes(
    capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], rounds: int
) -> None:
    arguments = ("train", *FAST, "--processes", "1", *options, "--out")
    undisturbed, out = tmp_path / "a", tmp_path / "b"
    assert resist(capsys, *arguments, str(undisturbed))[0] == 0
    append = Run.append

    def appended(run: Run, record: Mapping[str, object]) -> None:
        append(run, record)
        if record["round"] == rounds - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "append", appended)
        status, text, _ = resist(capsys, *arguments, str(out))
    assert status == 75
    assert f"interrupted after round {rounds}; to continue" in text
    assert accuracies(out)[-1] is None
    for processes in ("1", "2"):  # the second time it has ended
        status, text, err = resist(capsys, "train", "--resume", str(out), "--processes", processes)
        assert (status, err) == (0, "")
    assert f"the run has ended after round {rounds}; its network is {out}" in text
    assert accuracies(out) == accuracies(undisturbed)
    names = {path.name for path in undisturbed.glob("*.safetensors")}
    assert names == {path.name for path in out.glob("*.safetensors")}
    for name in names:
        expected, found = load_file(undisturbed / name), load_file(out / name)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    state = (out / "state.json").read_text()
    (out / "state.json").write_text(state.replace("finished", "running"))  # killed after the last checkpoint
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join(lines[:-1] if "--optimizer" in options else lines))
    (out / "model.safetensors").unlink()
    assert resist(capsys, "train", "--resume", str(out), "--processes", "2")[0] == 0
    assert resist(capsys, "report", str(out))[0] == 0
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert json.loads((out / "state.json").read_text())["state"] == "finished"
    assert accuracies(out) == accuracies(undisturbed)


LONG = ["--workers", "3", *FAST[2:-8], "--epochs", "0.4", "--num-evals", "1", "--checkpoint-rounds", "2", *FAST[-4:]]
ROUNDS = 6


def interrupt() -> None:
    """Send SIGTERM to the launcher after the record of round 3, and go on when it has come back from there."""
    import os
    import signal
    import time

    from resist.runs.directory import Run

    append, received = Run.append, []

    def appended(run, record):
        append(run, record)
        if record["round"] == 3:
            handler = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *arguments: (received.append(1), handler(*arguments)))
            os.kill(os.getppid(), signal.SIGTERM)
            while not received:
                time.sleep(0.01)

    Run.append = appended


def lose() -> None:
    """Kill process 2 as it begins the synchronization of round 4, in the first attempt."""
    import os
    import signal

    import resist.job

    synchronize = resist.job.Job.synchronize

    def lost(job, *arguments):
        if job.round == 3 and os.environ["RANK"] == "2" and not os.path.exists("lost"):
            open("lost", "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return synchronize(job, *arguments)

    resist.job.Job.synchronize = lost


def lose_in_the_last_test() -> None:
    """Kill process 2 as it begins the test after the last round, in the first attempt."""
    import os
    import signal

    from resist.training.evaluation import Evaluation

    test = Evaluation.test

    def lost(evaluation, *, last):
        if last and os.environ["RANK"] == "2" and not os.path.exists("lost again"):
            open("lost again", "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return test(evaluation, last=last)

    Evaluation.test = lost


@pytest.fixture(scope="module")
def interrupted(_commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three processes that SIGTERM ended after its fourth round."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    done = _commands.run("train", *LONG, "--out", out, prelude=interrupt)
    assert (done.returncode, done.stderr) == (75, "")
    assert "resist train --resume" in done.stdout
    assert len(accuracies(out)) == 4
    return out


@pytest.mark.slow
def test_a_run_that_was_interrupted_or_lost_a_worker_ends_with_the_same_weights(
    capsys, commands: Commands, interrupted: Path, tmp_path
) -> None:
    """SIGTERM and then --resume; a killed worker and --restarts: bit for bit the undisturbed run."""
    undisturbed = commands.run("train", *LONG, "--out", tmp_path / "a")
    assert (undisturbed.returncode, undisturbed.stderr) == (0, "")

    shutil.copytree(interrupted, tmp_path / "b")
    again = commands.run("train", "--resume", tmp_path / "b")
    assert (again.returncode, again.stderr) == (0, "")

    robbed = commands.run("train", *LONG, "--restarts", "1", "--out", tmp_path / "c", cwd=tmp_path, prelude=lose)
    assert robbed.returncode == 0, robbed.stderr
    assert "restart 1 of 1" in robbed.stderr

    arguments = (*LONG, "--replicate", "--restarts", "1", "--out", tmp_path / "d")
    robbed = commands.run("train", *arguments, cwd=tmp_path, prelude=lose_in_the_last_test)
    assert robbed.returncode == 0, robbed.stderr
    assert "resuming from the replicas of round 6" in robbed.stdout

    expected = load_file(tmp_path / "a" / "model.safetensors")
    for name in ("b", "c", "d"):
        found = load_file(tmp_path / name / "model.safetensors")
        counted = name != "d"  # replicas have no integers
        assert all(torch.equal(found[key], value) for key, value in expected.items() if counted or value.dim())
        rounds = [json.loads(line)["round"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert rounds == list(range(1, ROUNDS + 1))

    again = ("train", "--resume", str(tmp_path / "b"), "--processes", "1")
    status, text, err = resist(capsys, *again)
    assert (status, err) == (0, "")
    assert f"the run has ended after round {ROUNDS}; its network is" in text
    status, _, err = resist(capsys, *again, "--seed", "1")
    assert status == 2
    assert "--seed cannot change" in err


@pytest.mark.slow
def test_ddp_goes_on_from_a_checkpoint(commands: Commands, tmp_path: Path) -> None:
    """Its networks are wrapped by torch, which forms other buckets in the first step: sums are rounded otherwise."""
    arguments = ("train", *LONG[:2], *LONG[4:], "--strategy", "ddp")
    assert "--min-depth" not in arguments
    undisturbed = commands.run(*arguments, "--out", tmp_path / "a")
    assert (undisturbed.returncode, undisturbed.stderr) == (0, "")
    done = commands.run(*arguments, "--out", tmp_path / "b", prelude=interrupt)
    assert (done.returncode, done.stderr) == (75, "")
    again = commands.run("train", "--resume", tmp_path / "b")
    assert (again.returncode, again.stderr) == (0, "")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_workers(capsys, interrupted: Path, tmp_path) -> None:
    shutil.copytree(interrupted, tmp_path / "a")
    done = len(accuracies(tmp_path / "a"))
    status, text, _ = resist(capsys, "train", "--resume", str(tmp_path / "a"), "--workers", "2", "--processes", "1")
    assert status == 0
    assert "resuming with 2 workers instead of 3" in text
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    images = sum(record["images"] for record in records)
    assert len(records) > done
    assert images == pytest.approx(3 * 0.4 * 1437, rel=0.02)  # as many as all three together would have seen
    assert len(records[-1]["workers"]) == 2


@pytest.mark.slow
def test_hosts_without_a_shared_file_system_train_without_checkpoints(commands: Commands, tmp_path) -> None:
    port, processes = free_port(), []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        environment = {**HOST, "RANK": str(rank), "MASTER_PORT": port}
        processes.append(commands.start("train", *FAST, "--out", "run", cwd=tmp_path / str(rank), env=environment))
    texts = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "no checkpoints: process 1 does not see run" in texts[0]
    assert (tmp_path / "0" / "run" / "model.safetensors").exists()
    assert not list(tmp_path.glob("*/run/checkpoints/*"))
