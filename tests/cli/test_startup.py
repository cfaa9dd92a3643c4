"""Commands that train nothing come at once: they import neither torch nor another large package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import resist
from commands import Commands
from report_runs import make_run
from resist.cli import COMMANDS, main
from resist.runs.config import TrainConfig
from resist.runs.config_file import EARLIER

LARGE = ("torch", "torchvision", "numpy", "sklearn", "scipy", "matplotlib", "PIL", "safetensors", "sympy")
SCRIPT = """
import contextlib, io, json, sys
from resist.cli import main
for arguments in json.load(sys.stdin):
    before, out, err = set(sys.modules), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as exit:
            status = exit.code
    print(json.dumps([status, out.getvalue(), err.getvalue(), sorted({n.split(".")[0] for n in sys.modules})]))
"""


def run(commands: list[list[str]]) -> list[tuple[int, str, str, set[str]]]:
    """Run commands one after another in a new process: exit status, output, errors and the packages imported so far."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=json.dumps(commands), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(commands)
    return [(status, out, err, set(LARGE) & set(modules)) for status, out, err, modules in lines]


def test_help_version_and_mistakes_import_nothing_large() -> None:
    helps = [["--help"], *([command, "--help"] for command in COMMANDS)]
    mistakes = [["trian"], ["train", "--local-step", "5"], ["train", "--workers", "x"], ["evaluate"]]
    mistakes += [["train", "--lr", "-1"], ["train", "--capacities", "a"], ["train", "--resume", "none"]]
    for command, (status, out, err, large) in zip(helps, run(helps), strict=True):
        assert (status, err, large) == (0, "", set()), command
        assert len(out) > 100, command
    for command, (status, out, err, large) in zip(mistakes, run(mistakes), strict=True):
        assert (status, out, err.count("\n"), large) == (2, "", 1, set()), command


def test_report_and_watch_of_a_finished_run_import_nothing_large(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", rounds=4)
    state = {"state": "finished", "rounds": 4, "error": "", "host": "a", "process": 1}
    (path / "state.json").write_text(json.dumps(state))
    commands = [["report", str(path)], ["watch", str(path)]]
    for command, (status, out, err, large) in zip(commands, run(commands), strict=True):
        assert (status, err, large) == (0, "", set()), command
        assert out
    assert (path / "report.html").stat().st_size > 1000


INTERRUPTED = """
import os, signal, sys
target = sys.argv.pop(1)

def interrupt(event, arguments):
    if event == "import" and arguments[0] == target:
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
from resist.__main__ import main
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals of Unix")
@pytest.mark.parametrize(
    ("module", "command"),
    [("resist.cli", "report"), ("tyro", "train"), ("resist.cli.watch", "compare"), ("torch", "plan")],
)
def test_ctrl_c_during_an_import_ends_in_one_line(tmp_path: Path, module: str, command: str) -> None:
    # A suite in a shell's background ignores it.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{INTERRUPTED}"
    done = subprocess.run([sys.executable, "-c", code, module, command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "resist: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_ignored_where_it_was(tmp_path: Path) -> None:
    """As in a shell's background, and under nohup."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{INTERRUPTED}"
    done = subprocess.run([sys.executable, "-c", code, "tyro", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"resist {resist.__version__}\n", "")


@pytest.mark.skipif(os.name != "posix", reason="needs pipes of Unix")
def test_a_reader_that_stops_ends_a_process_without_a_word() -> None:
    """Nor does the interpreter complain when it closes standard output in the end."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "resist", "train", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"resist {resist.__version__}\n")


@pytest.mark.slow
def test_old_names_of_options_lead_to_the_new_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in {"safety": "--replicate", "sections": "--model-args depths=3,4,23,3"}.items():
        assert old in EARLIER
        with pytest.raises(SystemExit) as ended:
            main(["train", f"--{old}", "1"])
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err) == (2, "", f"resist: --{old} is now {new}; see resist train --help\n")


def test_old_names_lead_to_names_that_exist() -> None:
    entries = {name for values in TrainConfig().to_json().values() for name in values}
    assert {new for new, _ in EARLIER.values()} <= entries
    assert not EARLIER.keys() & entries


@pytest.mark.slow
def test_the_package_has_all_its_names_and_imports_them_when_they_are_used() -> None:
    code = (
        "import sys, resist\n"
        "assert 'torch' not in sys.modules and 'resist.job' not in sys.modules\n"
        "assert set(resist.__all__) <= set(dir(resist))\n"
        "assert resist.ddp(2, 5).workers == 2 and 'torch' not in sys.modules\n"
        "from resist import Job, Plan, schedule\n"
        "import resist.export\n"
        "assert resist.Job is Job is resist.job.Job and resist.sync.worker.Worker is resist.Worker\n"
        "assert all(getattr(resist, name) is not None for name in resist.__all__)\n"
        "assert not hasattr(resist, 'jobs')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly  # test_processes_however_they_start_give_the_same_run compares forks with others
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_forked_workers_train_as_new_processes_do(commands: Commands, tmp_path: Path) -> None:
    """The records and the weights are the same, bit for bit, and so is the number of threads."""
    options = ["--workers", "2", "--processes", "2", "--min-depth", "0", "--model-args", "depths=1,1,5,1", "width=4"]
    options += ["--batch-size", "32", "--local-steps", "3", "--epochs", "0.1", "--num-evals", "1"]
    options += ["--batchnorm", "average", "--device", "cpu"]
    results = []
    for fork in ("1", "0"):
        out = tmp_path / fork
        done = commands.run("train", *options, "--out", out, env={"RESIST_FORK": fork})
        assert (done.returncode, done.stderr) == (0, "")
        environment = json.loads((out / "environment.json").read_text())
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert environment["threads"] == 1
        assert environment["processes"] == 2
        weights = (out / "model.safetensors").read_bytes()
        results.append(([(record["loss"], record["accuracy"], record["bytes"]) for record in records], weights))
    assert results[0] == results[1]
