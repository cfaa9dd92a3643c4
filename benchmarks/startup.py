"""Start-up of the commands, as ratios to `python -c "import torch"` in the same run.

    python benchmarks/startup.py --repeats 5

Each command runs in a new process, `--repeats` times in turn with the others; the minimum counts, because other work
on the machine only adds. `wall` is elapsed time, `cpu` the user and system time of the process and its children, and
`MB` the peak memory of the largest process. `train` is a run of one step in two processes on the digits, so nearly all
of it is start-up; `train, no fork` starts the same workers as new Python processes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RESIST = (sys.executable, "-m", "resist")
TRAIN = (
    "train", "--data", "digits", "--model", "preact_small", "--workers", "2", "--processes", "2",
    "--min-depth", "0", "--local-steps", "1", "--epochs", "0.02", "--batch-size", "32", "--num-evals", "1",
    "--device", "cpu", "--out",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Cost of one command: elapsed and processor seconds, and peak memory in MB."""

    wall_s: float
    cpu_s: float
    memory_mb: float

    def least(self, other: "Cost") -> "Cost":
        return Cost(min(self.wall_s, other.wall_s), min(self.cpu_s, other.cpu_s), min(self.memory_mb, other.memory_mb))


def measure(command: tuple[str, ...], status: int, **environment: str) -> Cost:
    """Run a command in a process of its own and measure it. Fails where its exit status is not `status`."""
    # os.wait4 counts this process and the children that it has waited for, and no other command of this benchmark.
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, code, usage = os.wait4(process.pid, 0)
    passed = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(code)
    assert process.returncode == status, f"{command} ended with status {process.returncode}"
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kB on Linux
    return Cost(passed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit)


def commands(run: Path, scratch: Path) -> dict[str, tuple[tuple[str, ...], int, dict[str, str]]]:
    """Command, exit status and environment by name; the first one is the reference."""
    return {
        "import torch": ((sys.executable, "-c", "import torch"), 0, {}),
        "--help": ((*RESIST, "--help"), 0, {}),
        "--version": ((*RESIST, "--version"), 0, {}),
        "train --help": ((*RESIST, "train", "--help"), 0, {}),
        "train --local-step 5": ((*RESIST, "train", "--local-step", "5"), 2, {}),
        "report RUN": ((*RESIST, "report", str(run), "--force"), 0, {}),
        "watch RUN": ((*RESIST, "watch", str(run)), 0, {}),
        "train": ((*RESIST, *TRAIN, str(scratch)), 0, {}),
        "train, no fork": ((*RESIST, *TRAIN, str(scratch)), 0, {"RESIST_FORK": "0"}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    costs: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as folder:
        run, scratch = Path(folder) / "run", Path(folder) / "scratch"
        subprocess.run([*RESIST, *TRAIN, str(run)], check=True, stdout=subprocess.DEVNULL)
        for _ in range(options.repeats):
            for name, (command, status, environment) in commands(run, scratch).items():
                cost = measure(command, status, **environment)
                costs[name] = cost.least(costs.get(name, cost))
                shutil.rmtree(scratch, ignore_errors=True)
    torch = costs["import torch"]
    print(f"{'':22}{'wall':>8}{'cpu':>8}{'MB':>8}{'wall / torch':>15}{'cpu / torch':>14}   min of {options.repeats}")
    for name, cost in costs.items():
        ratios = f"{cost.wall_s / torch.wall_s:15.2f}{cost.cpu_s / torch.cpu_s:14.2f}"
        print(f"{name:22}{cost.wall_s:8.2f}{cost.cpu_s:8.2f}{cost.memory_mb:8.0f}{ratios}")


if __name__ == "__main__":
    main()
