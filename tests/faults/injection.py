"""Faults, drawn at random from a seed, and what becomes of a run that suffers one: real processes, the real command.

A run trains a small network on the digits, 4 workers in 4 processes, a checkpoint every two rounds. One process is
killed, stopped, delayed by less than the timeout, or made to raise, at a named point. Whatever happens, the command
has to end by itself, leave no process behind, and say what was lost; going on from the last checkpoint (or starting
again, where there is no run yet) has to give the weights of an undisturbed run, bit for bit.

    python injection.py FOLDER TIMEOUT_S < faults.json      # prints the outcomes as JSON; processes are forked
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

import resist

ARGUMENTS = (
    "--data", "digits", "--model", "preact_small", "--model-args", "depths=1,1,5,1", "width=4", "--workers", "4",
    "--min-depth", "0", "--local-steps", "2", "--epochs", "0.25", "--batch-size", "32", "--lr", "0.05",
    "--num-evals", "2", "--checkpoint-rounds", "2", "--device", "cpu", "--processes", "4",
)  # fmt: skip
PROCESSES = 4
ROUNDS, SAVES, TESTS = 6, 3, 2  # what these arguments give
KINDS = ("kill", "stop", "delay", "raise")
# How often a process comes by each point in a run.
POINTS = {
    "start": 1, "joined": 1, "before exchange": ROUNDS, "shared part begun": ROUNDS, "sending blocks": 2 * ROUNDS,
    "awaiting blocks": 2 * ROUNDS, "awaiting shared part": ROUNDS, "save begun": SAVES, "writing": SAVES,
    "completing": SAVES, "before rename": SAVES, "after rename": SAVES, "assembling": TESTS, "evaluating": TESTS,
}  # fmt: skip
FIRST_ONLY = ("completing", "before rename", "after rename", "evaluating")  # where process 0 acts alone
SAVING = ("save begun", "writing", "completing", "before rename", "after rename")  # in the background
BEFORE_RUN = ("start", "joined")  # there is no run directory yet
# Seconds that a run may take beyond the timeout to notice, to say so and to end, on a machine that is busy with others.
MARGIN_S = 40.0
# Seconds after which a command is called hung.
LIMIT_S = 400.0
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Fault:
    kind: str
    point: str
    rank: int
    nth: int
    seconds: float = 0.0


@dataclass
class Outcome:
    """What became of a run. `problems` is empty where everything was as it has to be.

    to_end_s:   from the fault until the command had ended.
    statuses:   exit status of the run, then of each command with which it went on.
    said:       the lines on stderr of the run that faulted.
    """

    fault: Fault
    to_end_s: float = 0.0
    total_s: float = 0.0
    statuses: list[int] = field(default_factory=list)
    said: str = ""
    problems: list[str] = field(default_factory=list)


def draw(seed: int, number: int, timeout_s: float) -> list[Fault]:
    """`number` faults: every kind at every point once before any comes twice, else at random."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    while len(faults) < number:
        pairs = list(product(KINDS, POINTS))
        chance.shuffle(pairs)
        for kind, point in pairs:
            rank = 0 if point in FIRST_ONLY else chance.randrange(PROCESSES)
            seconds = round(chance.uniform(0.2, min(timeout_s / 2, 6.0)), 1) if kind == "delay" else 0.0
            faults.append(Fault(kind, point, rank, chance.randint(1, POINTS[point]), seconds))
    return faults[:number]


def environment(fault: Fault | None, mark: Path) -> dict[str, str]:
    paths = [str(HERE / "inject"), str(Path(resist.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "RESIST_FAULT_RUN": str(mark)}
    own["RESIST_FORK"] = "0"  # forks do not run sitecustomize
    if fault is not None:
        own["RESIST_FAULT"] = json.dumps({**asdict(fault), "mark": str(mark)})
    return {**os.environ, **own}


def left_behind(mark: Path) -> list[psutil.Process]:
    """Processes of a run that are still there: children inherit its environment."""
    return [process for process in psutil.process_iter() if _belongs(process, str(mark))]


def _belongs(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("RESIST_FAULT_RUN") == mark
    except psutil.Error:
        return False


def command(
    arguments: tuple[str, ...], fault: Fault | None, mark: Path, limit_s: float, *, warm: bool
) -> tuple[int | None, str]:
    """Run `resist` and wait. Returns its exit status (None: it did not end within `limit_s`) and what is on stderr.

    warm: in processes that are forked, see warm.py, instead of started.
    """
    errors, own = mark.with_suffix(".stderr"), environment(fault, mark)
    if warm:
        import warm as forked

        status = forked.command(arguments, own, errors, limit_s)
        return status, errors.read_text(errors="replace")
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "resist", *arguments], env=own, stdout=subprocess.DEVNULL, stderr=file
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
            process.kill()
            process.wait()
    return status, errors.read_text(errors="replace")


def undisturbed(folder: Path, timeout_s: float, *, warm: bool = False) -> Path:
    """The run that the others are compared with."""
    out = folder / "undisturbed"
    status, text = command(train(out, timeout_s), None, folder / "undisturbed.mark", LIMIT_S, warm=warm)
    assert (status, text) == (0, ""), text
    return out


def train(out: Path, timeout_s: float) -> tuple[str, ...]:
    return ("train", *ARGUMENTS, "--timeout-s", str(timeout_s), "--out", str(out))


def suffer(fault: Fault, folder: Path, reference: Path, timeout_s: float, *, warm: bool = False) -> Outcome:
    """One run with one fault, and whatever it takes to bring it to its end. `folder` is a new one for this fault."""
    folder.mkdir()
    out, mark, outcome, begun = folder / "run", folder / "mark", Outcome(fault), time.monotonic()
    status, outcome.said = command(train(out, timeout_s), fault, mark, LIMIT_S, warm=warm)
    ended = time.time()
    outcome.problems += list(_first(fault, status, outcome.said, mark))
    if mark.exists():
        outcome.to_end_s = round(ended - mark.stat().st_mtime, 2)
        if fault.kind != "delay" and outcome.to_end_s > timeout_s + MARGIN_S:
            outcome.problems.append(f"ended only {outcome.to_end_s} s after the fault")
    orphans = left_behind(mark)
    for process in orphans:
        process.kill()
    outcome.problems += [f"left process {process.pid} behind" for process in orphans]
    outcome.statuses.append(-1 if status is None else status)
    while outcome.statuses[-1] != 0 and len(outcome.statuses) < 4:
        again = ("train", "--resume", str(out)) if (out / "config.json").exists() else train(out, timeout_s)
        status, text = command(again, fault, mark, LIMIT_S, warm=warm)
        outcome.statuses.append(-1 if status is None else status)
        outcome.problems += [f"going on: {text.strip()}"] if status != 0 or text.strip() else []
    if outcome.statuses[-1] == 0:
        outcome.problems += list(_differences(out, reference))
    outcome.total_s = round(time.monotonic() - begun, 2)
    return outcome


def _first(fault: Fault, status: int | None, said: str, mark: Path) -> Iterator[str]:
    """What is wrong with how the run that faulted ended."""
    if not mark.exists():
        yield "the fault did not happen"
        return
    if status is None:
        yield "did not end"
    if fault.kind == "delay":
        if status != 0 or said:
            yield "a delay below the timeout disturbed it"
        return
    last = fault.nth == POINTS[fault.point] and fault.point == "after rename"
    if status == 0 and not last:
        yield "ended with status 0"
    traces = said.count("Traceback (most recent call last)")
    if traces > (fault.kind == "raise" and "injected at" in said and fault.point not in SAVING):
        yield "a traceback"
    if any(word in said for word in ("terminate called", "Fatal Python error", "Exception ignored", "[E", "[W")):
        yield "noise"
    caught = fault.kind == "raise" and fault.point in SAVING  # a checkpoint that could not be written
    if ("injected" if caught else f"worker {fault.rank}") not in said:
        yield "no line names the cause" if caught else "no line names the worker"
    if fault.point not in BEFORE_RUN and "--resume" not in said:
        yield "no line names the remedy"


def _differences(out: Path, reference: Path) -> Iterator[str]:
    expected, found = (load_file(path / "model.safetensors") for path in (reference, out))
    if expected.keys() != found.keys() or not all(torch.equal(found[k], value) for k, value in expected.items()):
        yield "other weights than the undisturbed run"
    rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    if rounds != list(range(1, ROUNDS + 1)):
        yield f"metrics.jsonl has the rounds {rounds}"


if __name__ == "__main__":
    given, folder, patience = [Fault(**one) for one in json.load(sys.stdin)], Path(sys.argv[1]), float(sys.argv[2])
    base = undisturbed(folder, patience, warm=True)
    outcomes = [suffer(one, folder / str(n), base, patience, warm=True) for n, one in enumerate(given)]
    print(json.dumps([asdict(outcome) for outcome in outcomes]))
