"""Checks of a first GPU: the tests that need one, and `resist train` in an order in which each step adds one thing."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from gpu_part import Findings, Settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "faults"))

from injection import Fault, command  # noqa: E402

# Runs a command: its arguments, a fault or None, a file that is made when the fault happens, a limit in seconds.
# Returns the exit status (None: it did not end) and what is on stderr.
Runner = Callable[[tuple[str, ...], Fault | None, Path, float], tuple[int | None, str]]
TF32 = 5e-3  # most by which a loss differs after some steps whose convolutions are in TF32
STEP_S = 150.0  # most that a command may take
MOST_SHOWN = 2000  # characters of its output that are kept where it has failed
KILLED = Fault("kill", "sending blocks", 1, 2)


@dataclass(frozen=True)
class Step:
    """A step of the order.

    Attributes:
        name: Its name.
        arguments: Arguments of `resist train`, without those that all steps have.
        config: Sections of a configuration file.
        gpus: GPUs that it needs.
        like: The step whose last loss it must have.
        within: Largest difference from that loss, relative to it.
        fault: A fault of one of its processes.
        resumes: The step whose run it continues.
    """

    name: str
    arguments: tuple[str, ...] = ()
    config: tuple[tuple[str, str, object], ...] = ()
    gpus: int = 1
    like: str = ""
    within: float = 1e-3
    fault: Fault | None = None
    resumes: str = ""


def tests(settings: Settings, found: Findings) -> None:
    """Run the tests that need a GPU; in a tiny run those that show the same on the CPU."""
    report = settings.out / "gpu-tests.xml"
    # On another torch and Python than those of development, a warning is no failure.
    marked = "not nightly" if settings.tiny else "cuda"
    arguments = ["-m", "pytest", "-m", marked, "-W", "default", "-p", "no:cacheprovider", "--junitxml", str(report)]
    done = subprocess.run([sys.executable, *arguments, "tests/gpu"], cwd=ROOT, env=environment(), check=False)
    found.add(status=done.returncode, **read_report(report))
    if done.returncode:
        raise SystemExit(f"{len(found.values['failed'])} tests failed; see the output above")


def read_report(file: Path) -> dict[str, Any]:
    """Return the counts of a report in JUnit's form, and the first lines of what failed or was skipped."""
    cases = list(ElementTree.parse(file).iter("testcase"))
    kinds: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
    for case in cases:
        for tag, kind in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            for node in case.iter(tag):
                kinds[kind][str(case.get("name"))] = str(node.get("message")).partition("\n")[0][:200]
    file.unlink()
    return {"passed": len(cases) - sum(map(len, kinds.values())), **kinds}


def environment() -> dict[str, str]:
    """Return the environment of a command that finds this checkout, and meets others at the loopback interface."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def steps(settings: Settings) -> list[Step]:
    """List the steps, each of which adds one thing to those before."""
    one, two = ("--processes", "1"), ("--processes", "2")
    contiguous = ("machine", "channels_last", False)
    found = [
        Step("cpu", ("--device", "cpu", *one)),
        Step("one process", one, like="cpu", within=TF32),
        Step("bf16", (*one, "--precision", "bf16"), like="cpu", within=0.1),
        Step("contiguous", one, (contiguous,), like="cpu", within=TF32),
        Step("compiled", (*one, "--precision", "bf16", "--compile"), like="cpu", within=0.1),
        Step("gloo, two processes", two, (("machine", "backend", "gloo"),), like="one process"),
        Step("ddp, two processes", (*two, "--workers", "2", "--strategy", "ddp")),
        Step("killed while sending", (*two, "--replicate"), fault=KILLED),
        Step("resumed", resumes="killed while sending", like="one process"),
        Step("nccl, two GPUs", two, (("machine", "backend", "nccl"),), gpus=2, like="one process"),
        Step("nccl, a process without messages", ("--processes", "3", "--workers", "3", "--seed", "4"),
             (("machine", "backend", "nccl"),), gpus=3),
        Step("nccl, killed", (*two, "--replicate"), (("machine", "backend", "nccl"),), gpus=2, fault=KILLED),
    ]  # fmt: skip
    compiles = settings.compile and not settings.tiny  # a compiler for the CPU takes longer than all steps
    return [step for step in found if compiles or step.name != "compiled"]


def order(settings: Settings, found: Findings, runner: Runner | None = None) -> None:
    """Run `resist train` step by step; a step that fails does not stop those after it.

    Args:
        settings: Settings of the part.
        found: Where the outcome of each step is written.
        runner: Runs a command. Default: in new processes.
    """
    gpus = torch.cuda.device_count() if settings.on_gpu else 1
    outcomes: dict[str, dict[str, Any]] = {}
    folder = Path(tempfile.mkdtemp(prefix="gpu-order-"))  # no TemporaryDirectory, which also ends with a fork
    for step in steps(settings):
        outcomes[step.name] = (
            {"skipped": f"needs {step.gpus} GPUs, and there is {gpus}"}
            if step.gpus > gpus
            else _outcome(settings, step, folder, outcomes, runner or start)
        )
        found.add(order=outcomes)
    shutil.rmtree(folder)
    if wrong := [name for name, outcome in outcomes.items() if outcome.get("problem")]:
        raise SystemExit(f"steps with a problem: {', '.join(wrong)}; see the result line")


def start(arguments: tuple[str, ...], fault: Fault | None, mark: Path, limit_s: float) -> tuple[int | None, str]:
    """Run `resist` in new processes; see `Runner`."""
    return command(arguments, fault, mark, limit_s, warm=False)


def _outcome(
    settings: Settings, step: Step, folder: Path, before: dict[str, dict[str, Any]], runner: Runner
) -> dict[str, Any]:
    """Run one step in a folder, and judge it."""
    out = folder / (step.resumes or step.name).replace(" ", "-").replace(",", "")
    mark, limit_s = folder / f"{out.name}.{len(before)}", min(STEP_S, settings.left_s())
    if limit_s <= 0:
        return {"problem": "no time was left"}
    begin = time.monotonic()
    status, errors = runner(arguments(settings, step, out), step.fault, mark, limit_s)
    outcome = {"status": status, "seconds": round(time.monotonic() - begin, 1), "loss": last_loss(out)}
    if step.fault is not None:
        named = f"worker {step.fault.rank}" in errors or "workers 2" in errors
        wrong = "" if status and named and mark.exists() else "no line names the lost worker"
    else:
        wrong = "" if status == 0 else f"exit status {status}"
        if step.like and not wrong:
            expected, loss = before[step.like].get("loss"), outcome["loss"]
            outcome["difference"] = abs(loss / expected - 1) if loss and expected else None
            wrong = "" if expected else f"{step.like!r} has no loss to compare with"
            if expected and (outcome["difference"] is None or not outcome["difference"] <= step.within):
                wrong = f"another loss than {step.like!r}"
    if wrong:
        outcome |= {"problem": wrong, "stderr": errors.strip()[-MOST_SHOWN:]}
    return outcome


def arguments(settings: Settings, step: Step, out: Path) -> tuple[str, ...]:
    """Return the arguments of a step's command.

    Args:
        settings: Settings of the part.
        step: The step.
        out: Its run directory; beside it a configuration file is written.
    """
    if step.resumes:
        return ("train", "--resume", str(out))
    # The chain has 12 blocks: three workers, of which one has no message in the first round of seed 4.
    size = ("depths=1,1,5,1", "width=4") if settings.tiny else ("depths=1,1,13,1", "width=16")
    common = (
        "--data", "digits", "--model", "preact_small", "--model-args", *size, "--workers", "4", "--local-steps", "3",
        "--epochs", "0.12" if settings.tiny else "0.3", "--batch-size", "32", "--lr", "0.02", "--num-evals", "1",
        "--checkpoint-rounds", "1", "--timeout-s", "30", "--device", settings.device.type, "--out", str(out),
        *(("--batchnorm", "average") if settings.tiny else ()),  # re-estimating takes longer than training here
        *(() if "ddp" in step.arguments else ("--min-depth", "0")),
    )  # fmt: skip
    if step.config:
        sections: dict[str, dict[str, object]] = {}
        for section, key, value in step.config:
            sections.setdefault(section, {})[key] = value
        file = out.with_suffix(".json")
        file.write_text(json.dumps(sections))
        common = (*common, "--config", str(file))
    return ("train", *_merged(common, step.arguments))


def _merged(common: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """Replace the options of `common` that `own` has; those have one value each."""
    rest = list(common)
    for option in (word for word in own if word.startswith("--") and word in rest):
        first = rest.index(option)
        del rest[first : first + 2]
    return (*rest, *own)


def last_loss(out: Path) -> float | None:
    """Return the loss of a run's last round; None if it has none."""
    file = out / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return float(json.loads(lines[-1])["loss"]) if lines else None
