"""Everything that only a GPU can show, in parts of at most eight minutes, for a machine that may vanish.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py tests order --out FOLDER
    python benchmarks/gpu.py resist local-sgd --data PARTS --train-s 150 --out FOLDER
    python benchmarks/gpu.py --tiny --out FOLDER                  # all parts on a CPU, to try the script

Each part runs in a process of its own, which is killed at its limit, and ends in one line of FOLDER/gpu.jsonl: what it
has found, how it ended, and where. What the part that runs has found so far is in FOLDER/gpu-under-way.json, and what
it prints in FOLDER/gpu.log. The exit status is 0 if all parts ended as they should.

CIFAR-10 comes in files of under 60 MB: `python benchmarks/gpu_data.py` makes these.

It runs from a checkout, with `src` on PYTHONPATH, torch 2.11 or newer and Python 3.11 or newer, without a network. It
needs torch, torchvision, numpy, scikit-learn, safetensors, rich and matplotlib; where these are not installed, bring
wheels of them, and of tyro, docstring-parser and typeguard for the command `resist` (parts tests and order). The part
`tests` also needs pytest, pytest-timeout, hypothesis and psutil, and `order` psutil. Compiling needs Triton, which
comes with torch, and a C compiler; `--no-compile` does without. RESIST_COMMIT names the commit where there is no git.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gpu_links
import gpu_order
import gpu_speed
import gpu_training
from gpu_part import UNDER_WAY, Findings, Settings

RESULTS = Path(__file__).parent / "results"
MOST_S = 480.0
SPARE_S = 10.0  # between the time that a part gives itself, and its end by force


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        run: Runs it.
        limit_s: Its time limit.
        about: Its description.
    """

    run: Callable[[Settings, Findings], None]
    limit_s: float
    about: str


PARTS = {
    "tests": Part(gpu_order.tests, 300, "the tests that need a GPU"),
    "order": Part(gpu_order.order, 420, "resist train, step by step: precisions, two processes, a lost one, a resume"),
    "links": Part(gpu_links.links, 180, "rounds of two processes: gloo on a shared GPU, NCCL on two"),
    "memory": Part(gpu_speed.memory, 180, "peak memory of a step against the prediction of resist cost"),
    "speed": Part(gpu_speed.speed, 420, "images/s of a sub-network under Job and in plain torch, of the full network"),
    "resist": Part(gpu_training.train_resist, 480, "ResIST on CIFAR-10 at full width for --train-s seconds"),
    "local-sgd": Part(gpu_training.train_local_sgd, 480, "local SGD, the same"),
}


def main() -> None:
    args = parse(sys.argv[1:])
    if args.list:
        print("\n".join(f"{name:10} {part.limit_s:4.0f} s  {part.about}" for name, part in PARTS.items()))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.as_part:
        raise SystemExit(run_here(args.as_part, settings_of(args, args.as_part)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part is ended, too
    lines = [run_apart(name, sys.argv[1:], args) for name in args.parts or PARTS]
    raise SystemExit(any(line["ended"] != "complete" for line in lines))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; exits with a line where they cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--data", type=Path, help="folder with the parts of CIFAR-10")
    parser.add_argument("--train-s", type=float, default=150.0, help="seconds of training for each method")
    parser.add_argument("--lr", type=float, default=0.05, help="highest learning rate of training")
    parser.add_argument("--limit-s", type=float, default=MOST_S, help="time limit of each part, at most 480")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the networks")
    parser.add_argument("--tiny", action="store_true", help="try all parts on the CPU, with tiny networks")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits")
    parser.add_argument("--as-part", help=argparse.SUPPRESS)  # the process of one part
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; give some of {', '.join(PARTS)}")
    for name, most in (("limit_s", MOST_S), ("train_s", MOST_S), ("lr", 10.0)):
        if not 0 < getattr(args, name) <= most:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name):g}: give a number above 0, at most {most:g}")
    if not (args.tiny or args.list or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device here; give --tiny to try the parts on the CPU")
    return args


def settings_of(args: argparse.Namespace, name: str) -> Settings:
    """Return the settings of a part."""
    return Settings(
        device=torch.device("cpu") if args.tiny else torch.device("cuda", 0),
        out=args.out.resolve(),
        seconds=max(1.0, min(PARTS[name].limit_s, args.limit_s) - SPARE_S),
        data=args.data,
        train_s=args.train_s,
        lr=args.lr,
        tiny=args.tiny,
        compile=not args.no_compile,
    )


def run_here(name: str, settings: Settings) -> int:
    """Run a part in this process. Returns the exit status."""
    if settings.on_gpu:
        torch.cuda.set_device(settings.device)
    found = Findings(settings.out, name)
    try:
        PARTS[name].run(settings, found)
    except (Exception, SystemExit) as error:
        found.add(error=f"{type(error).__name__}: {error}"[:500])
        raise
    return 0


def run_apart(name: str, arguments: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own, and append its line to the results."""
    limit_s, under_way = min(PARTS[name].limit_s, args.limit_s), args.out / UNDER_WAY
    under_way.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if args.tiny:  # the kernels of torch 2.14's oneDNN for AVX2 fail for very narrow networks
        environment.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")
    print(f"{name}: at most {limit_s:.0f} s", flush=True)
    begin = time.monotonic()
    with (args.out / "gpu.log").open("ab") as log:
        log.write(f"\n--- {name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--as-part", name],
            stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    found = json.loads(under_way.read_text()) if under_way.exists() else {"benchmark": "gpu", "part": name}
    under_way.unlink(missing_ok=True)
    ended = "complete" if status == 0 else f"exit status {status}" if status is not None else "killed at its limit"
    line = {**found, "ended": ended, "seconds": round(time.monotonic() - begin, 1), "limit_s": limit_s}
    with (args.out / "gpu.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
