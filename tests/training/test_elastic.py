"""Runs whose processes come and go: `resist train --elastic`, on this machine."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import resist
from commands import Command, Commands, free_port
from resist.models import build
from resist.models.pretrained import to_timm
from resist.runs.history import read_history

ARGUMENTS = (
    "train", "--data", "digits", "--model-args", "depths=1,1,5,1", "width=4", "--batch-size", "64", "--num-evals", "1",
    "--local-steps", "5", "--min-depth", "0", "--epochs", "2", "--out", "run",
)  # fmt: skip
# Processes that are started again import this package, whatever is installed.
SOURCE = {"PYTHONPATH": str(Path(resist.__file__).parents[1])}


def disturb() -> None:
    """Give processes the faults of FAULTS, "ROUND:WORKER:SIGNAL", once; round 7 waits for those that come."""
    import contextlib
    import os
    import signal
    import time

    from resist.members.membership import Membership
    from resist.training.loop import Training

    faults = [fault.split(":") for fault in os.environ["FAULTS"].split()]
    end_round, newcomers = Training._end_round, Membership.newcomers
    numbers = [0]

    def disturbed(self, *args, **kwargs):
        numbers.append(self.round_number)
        for round, worker, name in faults:
            if (int(round), int(worker)) == (self.round_number, self.trainers[0].index):
                with contextlib.suppress(FileExistsError):
                    open(f"fault-{round}-{worker}", "x").close()
                    os.kill(os.getpid(), getattr(signal, name))
        return end_round(self, *args, **kwargs)

    def patient(self):
        end, waits = time.monotonic() + 60, numbers[-1] == 7 and len(self.generation.members) < len(faults) + 2
        while not (found := newcomers(self)) and waits and time.monotonic() < end:
            time.sleep(0.05)
        return found

    Training._end_round, Membership.newcomers = disturbed, patient


def train(commands: Commands, folder: Path, faults: str, *options: str) -> tuple[int, str, str]:
    running: Command = commands.start(
        *ARGUMENTS, *options, cwd=folder, env=SOURCE | {"FAULTS": faults}, prelude=disturb
    )
    out, err = running.communicate()
    assert running.returncode is not None
    return running.returncode, out, err


def generations(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [generation for record in records for generation in record.get("generations", ())]


def check_complete(run: Path, workers: int) -> None:
    """The run is finished, with each round once, with all the images that it was to see, and the whole network."""
    history = read_history(run)
    assert history.ended == "finished"
    assert not history.notes
    assert [record["round"] for record in history.rounds] == list(range(1, len(history.rounds) + 1))
    asked = 2 * 1437 * workers
    assert asked <= sum(record["images"] for record in history.rounds) + 5 * 64 * workers  # but those that were lost
    assert sum(record["images"] for record in history.rounds) < asked + 5 * 64 * workers
    assert history.accuracies[-1] > 0.5
    names = {name for name in load_file(run / "model.safetensors") if name.startswith("layer3.")}
    assert {name.split(".")[1] for name in names} == set("01234")


@pytest.mark.timeout(100)
def test_a_process_that_is_killed_is_started_again_and_comes_back(commands: Commands, tmp_path: Path) -> None:
    status, out, err = train(commands, tmp_path, "3:1:SIGKILL", "--elastic", "2:3")
    assert status == 0, out + err
    assert err.count("\n") == err.count("ended by SIGKILL\n") == 1
    found = generations(tmp_path / "run")
    assert out.count("generation ") == len(found)
    assert [one["number"] for one in found] == sorted({one["number"] for one in found})
    assert (len([n for one in found for n in one["left"]]), [n for one in found for n in one["came"]]) == (1, [4])
    assert found[-1]["workers"] == 3
    assert all(0 < one["pause_s"] < 30 for one in found)
    check_complete(tmp_path / "run", 3)


@pytest.mark.parametrize(
    ("environment", "options", "text"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            (),
            "RANK and WORLD_SIZE are set, as by torchrun",
        ),
        ({"MASTER_ADDR": "127.0.0.1"}, (), "--elastic with MASTER_ADDR: give --out, the same directory"),
        ({"MASTER_ADDR": "127.0.0.1", "RESIST_SECRET": "short"}, ("--out", "run"), "it must have 16 to 4096"),
        (
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RESIST_SECRET": "0123456789abcdef"},
            ("--out", "run", "--timeout-s", "1"),
            "the store at 127.0.0.1:1 cannot be reached within 1 s",
        ),
    ],
)
def test_a_process_that_cannot_join_says_why(
    commands: Commands, tmp_path: Path, environment: dict[str, str], options: tuple[str, ...], text: str
) -> None:
    done = commands.run("train", "--elastic", "2:3", *options, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert text in done.stderr


@pytest.mark.nightly
def test_who_has_other_initial_weights_or_another_directory_is_refused_and_disturbs_nobody(
    commands: Commands, tmp_path: Path
) -> None:
    torch.manual_seed(1)  # the run has seed 0
    weights = to_timm(build("preact_resnet101_imagenet", num_classes=10, depths=(1, 1, 3, 1), width=2).state_dict())
    save_file(weights, tmp_path / "weights.safetensors")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "RESIST_SECRET": "0123456789abcdef"}

    def host(*options: str) -> Command:
        network = ("--model", "preact_resnet101_imagenet", "--model-args", "depths=1,1,3,1", "width=2")
        members = ("--elastic", "1:2", "--workers", "1", "--epochs", "999")
        return commands.start(*ARGUMENTS, *network, *members, *options, cwd=tmp_path, env=place)

    store = commands.start("rendezvous", "--bind", "127.0.0.1", "--port", place["MASTER_PORT"], env=place)
    first = host()
    await_generations(tmp_path / "run", first, 0)
    other = host("--init-from", "timm:weights.safetensors")
    out, err = other.communicate()
    assert (other.returncode, err.count("\n")) == (2, 1), out + err
    assert "cannot join the run: digest of the initial weights (--init-from) is " in err
    other = host("--out", "elsewhere/run")
    out, err = other.communicate()
    first.send_signal(signal.SIGTERM)
    assert (other.returncode, err.count("\n")) == (2, 1), out + err
    assert "cannot join the run: it does not see elsewhere/run as the members do; give --out in a directory" in err
    _, err = first.communicate()
    assert (first.returncode, err, generations(tmp_path / "run")) == (75, "", [])
    store.kill()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param("3:0:SIGKILL", id="the main process"),
        pytest.param("3:0:SIGKILL 4:0:SIGKILL", id="two main processes, one after the other"),
        pytest.param("3:2:SIGKILL 5:1:SIGKILL", id="two workers, one after the other"),
        pytest.param("3:0:SIGSTOP", id="a main process that stops"),
        pytest.param("3:1:SIGSTOP", id="a worker that stops"),
    ],
)
def test_whoever_is_lost_the_others_go_on(commands: Commands, tmp_path: Path, faults: str) -> None:
    status, out, err = train(commands, tmp_path, faults, "--elastic", "2:4")
    assert status == 0, out + err
    found = generations(tmp_path / "run")
    assert sum(len(one["left"]) for one in found) == len(faults.split())
    assert "SIGSTOP" in faults or any(one["came"] for one in found)
    check_complete(tmp_path / "run", 4)


@pytest.mark.nightly
@pytest.mark.parametrize("faults", ["3:0:SIGKILL 5:1:SIGKILL", "3:2:SIGSTOP"])
def test_a_compressed_exchange_in_fragments_goes_on(commands: Commands, tmp_path: Path, faults: str) -> None:
    status, out, err = train(commands, tmp_path, faults, "--elastic", "2:4", "--wire", "int4", "--fragments", "2")
    assert status == 0, out + err
    found = generations(tmp_path / "run")
    assert sum(len(one["left"]) for one in found) == len(faults.split())
    check_complete(tmp_path / "run", 4)


@pytest.mark.nightly
def test_where_too_much_is_lost_at_once_the_run_goes_on_from_its_checkpoint(commands: Commands, tmp_path: Path) -> None:
    faults = "6:1:SIGKILL 6:2:SIGKILL 6:3:SIGKILL"
    status, out, err = train(commands, tmp_path, faults, "--elastic", "1:4", "--checkpoint-rounds", "2")
    assert status == 0, out + err
    assert "and no process has a copy; all go on from the newest checkpoint" in out
    assert any(one["repeated"] for one in generations(tmp_path / "run"))
    check_complete(tmp_path / "run", 4)


@pytest.mark.nightly
def test_with_too_few_left_the_run_ends_in_order_and_goes_on_later(commands: Commands, tmp_path: Path) -> None:
    status, out, err = train(commands, tmp_path, "3:0:SIGKILL", "--elastic", "2:2")
    assert status == 1, out + err
    assert "1 member is left, fewer than least=2" in err
    assert err.rstrip().endswith("continue with resist train --resume run")
    done = commands.run("train", "--resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming from the replicas of round 2" in done.stdout
    check_complete(tmp_path / "run", 2)


@pytest.mark.nightly
def test_a_signal_ends_a_run_in_order(commands: Commands, tmp_path: Path) -> None:
    running = commands.start(*ARGUMENTS, "--elastic", "2:3", "--epochs", "300", cwd=tmp_path)
    await_generations(tmp_path / "run", running, 0)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate()
    assert (running.returncode, err) == (75, "")
    assert "to continue: resist train --resume run" in out


@pytest.mark.nightly
def test_hosts_by_hand_come_and_leave_and_are_compared(commands: Commands, tmp_path: Path) -> None:
    port, run = free_port(), tmp_path / "run"
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RESIST_SECRET": "0123456789abcdef", "FAULTS": ""}

    def host(*options: str) -> Command:
        return commands.start(*ARGUMENTS, "--elastic", "2:3", *options, cwd=tmp_path, env=place, prelude=disturb)

    store = commands.start("rendezvous", "--bind", "127.0.0.1", "--port", port, env=place)
    options = ("--workers", "2", "--epochs", "100")
    hosts = [host(*options) for _ in range(2)]
    await_generations(run, hosts[0], 0)
    other, third = host(*options, "--lr", "0.5"), host(*options)
    _, err = other.communicate()
    assert (other.returncode, err.count("\n")) == (2, 1)
    assert "this process cannot join the run: lr is 0.5 here" in err
    await_generations(run, hosts[0], 1)
    main = int(json.loads((run / "state.json").read_text())["process"])
    first = next(one for one in hosts if one.pid == main)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate()
    assert (first.returncode, err) == (75, "")
    assert "the others go on" in out
    others = [one for one in (*hosts, third) if one is not first]
    await_generations(run, others[0], 2)
    for one in others:
        one.send_signal(signal.SIGTERM)
    assert [one.wait() for one in others] == [75, 75]
    history = read_history(run)
    assert (history.ended, history.notes) == ("interrupted", [])
    assert [(len(one["left"]), len(one["came"])) for one in history.generations] == [(0, 1), (1, 0)]
    store.kill()


def await_generations(run: Path, running: Command, number: int) -> None:
    """Wait until a run has records, and so many changes of members."""
    file = run / "metrics.jsonl"
    while not file.exists() or not file.stat().st_size or len(generations(run)) < number:
        assert running.poll() is None
        time.sleep(0.05)
