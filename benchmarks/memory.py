"""Measure the peak memory of a worker: its sub-network, the full network, and a synchronization.

    python benchmarks/memory.py                                     # the paper's ResNet101 with 100 classes, S = 4
    python benchmarks/memory.py --width 8 --batches 2 8             # takes minutes, as a test

Every figure comes from a separate process. On the CPU it is the highest resident size (VmHWM, Linux) minus the
resident size at the start, after the imports and a step of a tiny network have loaded the code. VmHWM is used instead
of getrusage's ru_maxrss, because that begins at the size of the parent process. glibc is set to return every freed
block above 128 KiB to the system, so the figure is the memory in use, without memory that an allocator keeps. On a GPU
it is torch.cuda.max_memory_allocated.

Training: two steps of SGD with momentum on random images (3 x 32 x 32), in fp32. The peak contains parameters,
gradients, momentum, flat tensors, activations and the workspace of the convolutions. One worker of S runs alone: it
takes its part of the network and never synchronizes.
Building: the peak while the job is built; the full network is built in CPU memory first.
Wire formats: S processes on loopback. The peak of the second round with its synchronization, above the size before the
job was built: what is sent as a change needs the round's first weights and the errors of the codes in every step.
Exchange: S processes on loopback. The peak of a synchronization minus the size before it, the largest over processes,
compared with the bytes of a worker's sub-network and of the full network. The first synchronization is reported
separately from the next three: it makes the connections, and arranges the optimizer's state like the weights.

One line of JSON with the provenance is appended to benchmarks/results/memory.jsonl.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import resist
from competitors import make
from own import momentum_sgd
from provenance import provenance
from resist.models import build
from resist.planning.methods import build_strategy
from resist.sync.local import Local

RESULTS = Path(__file__).parent / "results" / "memory.jsonl"
MB = 1e6
WIRED = ("resist", "resist,wire=int8", "resist,wire=int4", "resist,wire=int4,fragments=5,delay=1")


class Alone(Local):
    """A transport for worker 0 of S without the others: enough to build and train its sub-network."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.hosted: tuple[int, ...] = (0,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="preact_resnet101")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-record", action="store_true", help="do not append to the results")
    parser.add_argument("--as-part", help=argparse.SUPPRESS)  # a measuring process: its task, as JSON
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.as_part:
        part = json.loads(args.as_part)
        do = wired if "spec" in part else train if "batch" in part else exchange
        print(json.dumps(do(args, **part)))
        return
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        print("memory.py reads the peak from /proc, which this system lacks; run it on Linux, or with --device cuda")
        raise SystemExit(2)
    trained, changed, exchanged = measure(args)
    print(table(args, trained, changed, exchanged))
    settings = {k: getattr(args, k) for k in ("model", "width", "num_classes", "workers", "repetitions", "device")}
    record = {
        "benchmark": "memory",
        **settings,
        "training": trained,
        "wired": changed,
        "exchange": exchanged,
        **provenance("memory"),
    }
    if not args.no_record:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], ...]:
    """Measure bytes: the largest of the repetitions, and their spread."""
    trained, changed, exchanged = [], [], []
    for batch in args.batches:
        for strategy in ("resist", "local_sgd"):
            runs = [start({"strategy": strategy, "batch": batch})[0] for _ in range(args.repetitions)]
            peaks = [run["training_peak_bytes"] for run in runs]
            worst = max(runs, key=lambda run: run["training_peak_bytes"])
            trained.append({"strategy": strategy, "batch": batch, **worst, "spread_bytes": max(peaks) - min(peaks)})
    for spec in WIRED:
        part = {"spec": spec, "batch": max(args.batches)}
        peaks = [max(rank["peak_bytes"] for rank in start(part, args.workers)) for _ in range(args.repetitions)]
        changed.append({**part, "peak_bytes": max(peaks), "spread_bytes": max(peaks) - min(peaks)})
    for strategy, state in (("resist", "reset"), ("resist", "travel"), ("local_sgd", "reset")):
        part = {"strategy": strategy, "state": state}
        runs = [start(part, args.workers) for _ in range(args.repetitions)]
        exchanged.append({**part, "weights_bytes": runs[0][0]["weights_bytes"]})
        for key in ("first_bytes", "later_bytes"):
            peaks = [max(rank[key] for rank in run) for run in runs]
            exchanged[-1] |= {key: max(peaks), f"{key}_spread": max(peaks) - min(peaks)}
    return trained, changed, exchanged


def start(part: Mapping[str, object], processes: int = 1) -> list[dict[str, int]]:
    """Run `part` in new processes, each with the arguments of this one."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(processes):
            task = dict(part) if processes == 1 else {**part, "rank": rank, "folder": folder}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
            command = [sys.executable, *sys.argv, "--as-part", json.dumps(task)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"measuring {part} failed; see the error above")
    return [json.loads(output) for output in outputs]


def train(args: argparse.Namespace, strategy: str, batch: int) -> dict[str, int]:
    warm_up(args)
    baseline = begin(args.device)
    job = resist.Job(
        lambda: network(args),
        build_strategy(strategy, args.workers, 1),
        transport=Alone(args.workers),
        device=args.device,
    )
    building = peak(args.device) - baseline
    held = begin(args.device) - baseline
    steps(job.model, batch, args)
    return {
        "weights_bytes": job.workers[0].subnet.flat.nbytes,
        "held_after_building_bytes": held,
        "building_peak_bytes": building,
        "training_peak_bytes": peak(args.device) - baseline,
    }


def steps(model: nn.Module, batch: int, args: argparse.Namespace) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        step(model, optimizer, batch, args)


def step(model: nn.Module, optimizer: torch.optim.SGD, batch: int, args: argparse.Namespace) -> None:
    images = torch.randn(batch, 3, 32, 32, device=args.device)
    labels = torch.randint(args.num_classes, (batch,), device=args.device)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def warm_up(args: argparse.Namespace) -> None:
    """Load all code that a step needs: some 100 MB for any network."""
    tiny = build(args.model, num_classes=args.num_classes, depths=(1, 1, 2, 1), width=8)
    steps(tiny.to(args.device), 2, args)


def wired(args: argparse.Namespace, spec: str, batch: int, rank: int, folder: str) -> dict[str, int]:
    """Train two rounds with a wire format."""
    connect(args, rank, folder)
    warm_up(args)
    baseline = begin(args.device)
    local_steps = 10 if "fragments" in spec else 2
    method = make(spec, lambda: network(args), args.workers, local_steps)
    for _ in range(2):
        dist.barrier()
        begin(args.device)
        for number in range(local_steps):
            step(method.model, method.optimizer, batch, args)
            if number < local_steps - 1:
                method.step()
        method.synchronize()
    dist.barrier()
    return {"peak_bytes": peak(args.device) - baseline}


def connect(args: argparse.Namespace, rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.workers)


def exchange(args: argparse.Namespace, strategy: str, state: str, rank: int, folder: str) -> dict[str, int]:
    connect(args, rank, folder)
    chosen = build_strategy(strategy, args.workers, 1, optimizer_state=state)
    job = resist.Job(lambda: network(args), chosen, device=args.device)
    optimizer = momentum_sgd(job.model)
    step(job.model, optimizer, 2, args)  # running statistics change, and are exchanged too
    if state == "reset":
        optimizer.state.clear()  # otherwise the exchange first frees memory, which would hide its own use
    added: list[int] = []
    for _ in range(4):
        dist.barrier()
        before = begin(args.device)
        job.step(optimizer)
        added.append(peak(args.device) - before)
    dist.barrier()
    return {
        "weights_bytes": job.workers[0].subnet.flat.nbytes,
        "first_bytes": added[0],
        "later_bytes": max(added[1:]),
    }


def network(args: argparse.Namespace) -> nn.Module:
    return build(args.model, num_classes=args.num_classes, width=args.width)


def begin(device: str) -> int:
    """Reset the peak, and return the bytes in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str) -> int:
    """Return the highest number of bytes in use since `begin`."""
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def table(
    args: argparse.Namespace,
    trained: list[dict[str, Any]],
    changed: list[dict[str, Any]],
    exchanged: list[dict[str, Any]],
) -> str:
    lines = [
        f"One worker of S = {args.workers}, {args.device}; MB = 1e6 bytes; largest of {args.repetitions} runs",
        f"{'training':10} {'batch':>5} {'weights':>8} {'built':>7} {'peak, building':>14} {'training':>9} "
        f"{'spread':>6} {'share':>6}",
    ]
    for row in trained:
        full = next(r for r in trained if r["batch"] == row["batch"] and r["strategy"] == "local_sgd")
        share = row["training_peak_bytes"] / full["training_peak_bytes"]
        lines.append(
            f"{row['strategy']:10} {row['batch']:5} {row['weights_bytes'] / MB:8.1f} "
            f"{row['held_after_building_bytes'] / MB:7.1f} {row['building_peak_bytes'] / MB:14.1f} "
            f"{row['training_peak_bytes'] / MB:9.1f} {row['spread_bytes'] / MB:6.1f} {share:6.2f}"
        )
    lines.append(f"\n{'a round with its synchronization':40} {'batch':>5} {'peak':>7} {'spread':>6} {'more':>7}")
    for row in changed:
        more = row["peak_bytes"] / changed[0]["peak_bytes"] - 1
        lines.append(
            f"{row['spec']:40} {row['batch']:5} {row['peak_bytes'] / MB:7.1f} {row['spread_bytes'] / MB:6.1f} "
            f"{more:+7.1%}"
        )
    full_bytes = next(row["weights_bytes"] for row in trained if row["strategy"] == "local_sgd")
    lines.append(
        f"\n{'added by an exchange':20} {'weights':>8} {'first':>7} {'later':>7} {'spread':>7} {'of own':>7} "
        f"{'of full':>8}"
    )
    for row in exchanged:
        later = row["later_bytes"]
        lines.append(
            f"{row['strategy'] + ' ' + row['state']:20} {row['weights_bytes'] / MB:8.1f} "
            f"{row['first_bytes'] / MB:7.1f} {later / MB:7.1f} {row['later_bytes_spread'] / MB:7.1f} "
            f"{later / row['weights_bytes']:7.2f} {later / full_bytes:8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
