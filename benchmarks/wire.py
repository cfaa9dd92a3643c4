"""Measure seconds and bytes of a round over slow links: ResIST and its competitors on emulated hosts.

    python benchmarks/wire.py --rate 100mbit --workers 4 --compute-s 0.095 0.188
    python benchmarks/wire.py --rate 1gbit --workers 2 --depths 1 1 9 1 --width 32 --local-steps 2     # takes seconds

Every worker is a process in its own network namespace (namespaces.py), started with the variables that torch's
launchers set, and uses gloo. This needs Linux, root and iproute2. For the methods see competitors.py.

A round is `--local-steps` steps, then the synchronization of the method.
compute   seconds of the steps, on the slowest host: real steps on random images in fp32, unless `--compute-s SUB FULL`
          gives the seconds of one step of a sub-network and of the full network on another device. Then the hosts
          sleep that long, and the table says so: the ratio of compute to exchange is that of the named device.
exchange  seconds of the synchronization on the slowest host, after a barrier. DDP communicates within its steps: its
          value is the additional time of these steps, over `--ddp-steps` and scaled to a round. With `--compute-s` its
          layers sleep one after another in the backward pass (two thirds of a step), so that it overlaps compute and
          communication as usual.
wire      bytes sent by all interfaces in a round, headers included; ledger: payload, counted by this package; formula:
          payload, from the plans alone (for ResIST and local SGD) or from the ring (for one all-reduce).

A table is printed (`--json`: the record), and a line of JSON with provenance is appended to
benchmarks/results/wire.jsonl.
"""

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from competitors import Ddp, Method, check, make
from namespaces import INTERFACE, CannotEmulateError, Host, network, parse_rate, sent_bytes
from provenance import provenance
from resist import UserError
from resist.models import build

RESULTS = Path(__file__).parent / "results" / "wire.jsonl"
METHODS = (
    "resist,optimizer_state=reset",
    "resist,optimizer_state=travel",
    "resist,optimizer_state=average",
    "local_sgd,optimizer_state=reset",
    "flat",
    "averager",
    "published",
    "ddp",
)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if args.as_host:
        host_main(args)
        return
    try:
        rate_bit_s = parse_rate(args.rate)
        if args.workers < 2 or args.local_steps < 2 or args.rounds < 1 or args.ddp_steps < 1:
            raise ValueError("workers and local steps must be at least 2, rounds and DDP steps at least 1")
        check(args.methods, lambda: build_network(args), args.workers, args.local_steps)
        with network(args.workers, rate_bit_s) as hosts:
            rows = collect(run(hosts))
    except (CannotEmulateError, UserError, ValueError) as error:
        print(f"wire.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    left_out = ("as_host", "json", "no_record", "methods")
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    record = {"benchmark": "wire", "emulated": True, **settings, "methods": rows, **provenance()}
    print(json.dumps(record) if args.json else table(args, rows))
    if not args.no_record:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="rate of each link in each direction: 100mbit, 1gbit, ...")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--model", default="preact_resnet101")
    parser.add_argument("--depths", dest="sections", metavar="BLOCKS", type=int, nargs=4, default=())
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="images per step, without --compute-s")
    parser.add_argument("--local-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ddp-steps", type=int, default=4, help="steps of DDP that are measured in each round")
    parser.add_argument("--compute-s", type=float, nargs=2, metavar=("SUB", "FULL"), help="sleep instead of computing")
    parser.add_argument("--compute-note", default="", help="the device of these seconds; part of the output")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    parser.add_argument("--no-record", action="store_true", help="do not append to the results")
    parser.add_argument("--as-host", help=argparse.SUPPRESS)  # the process of one host: the file for its results
    return parser.parse_args()


def build_network(args: argparse.Namespace) -> nn.Module:
    return build(args.model, num_classes=args.num_classes, depths=tuple(args.sections), width=args.width)


def run(hosts: list[Host]) -> list[list[dict[str, Any]]]:
    """Return the results of each host, method by method. When one host fails, the others are killed."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank, host in enumerate(hosts):
            group = {"RANK": rank, "WORLD_SIZE": len(hosts), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": 29500}
            local = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": 1}
            quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # the hosts have no names, and torch would warn
            environment = os.environ | {key: str(value) for key, value in (group | local | quiet).items()}
            command = [*host.enter, sys.executable, *sys.argv, "--as-host", f"{folder}/{rank}.json"]
            running.append(subprocess.Popen(command, env=environment, stdout=sys.stderr))
        try:
            while any(process.poll() is None for process in running):
                if any(process.returncode for process in running):
                    raise SystemExit("a host failed; see the error above")
                time.sleep(0.1)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(len(hosts))]


def host_main(args: argparse.Namespace) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    dist.init_process_group("gloo")
    results = []
    for spec in args.methods:
        method = make(spec, lambda: build_network(args), args.workers, args.local_steps)
        results.append({"method": spec, "rounds": measure(method, args)})
        if dist.get_rank() == 0:
            print(f"{spec}: done", file=sys.stderr, flush=True)
        del method
    Path(args.as_host).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def measure(method: Method, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure rounds, after one to warm up. A barrier between compute and exchange is not counted."""
    ddp = isinstance(method, Ddp)
    steps = min(args.ddp_steps, args.local_steps) if ddp else args.local_steps
    steppers = [Steps(method, args, exchanging) for exchanging in ((False, True) if ddp else (False,))]
    rounds: list[dict[str, Any]] = []
    for number in range(-1, args.rounds):
        compute_s = [0.0, 0.0]
        dist.barrier()
        sent = sent_bytes()
        for index, stepper in enumerate(steppers):
            dist.barrier()
            start = time.perf_counter()
            stepper.run(steps)
            compute_s[index] = time.perf_counter() - start
        dist.barrier()
        start = time.perf_counter()
        method.synchronize()
        exchange_s = time.perf_counter() - start
        dist.barrier()
        sent = sent_bytes() - sent
        method.tidy()
        scale = args.local_steps / steps
        if ddp:
            exchange_s = max(0.0, compute_s[1] - compute_s[0])
        expected, counted = method.expected_bytes(), method.counted_bytes()
        entry = {"compute_s": compute_s[0] * scale, "exchange_s": exchange_s * scale, "sent_bytes": sent * scale}
        entry |= {"formula_bytes": expected and expected * (args.local_steps if ddp else 1), "ledger_bytes": counted}
        if number >= 0:
            rounds.append(entry)
    return rounds


class Steps:
    """Training steps: real ones, or sleep. `exchanging`: with DDP, which averages gradients."""

    def __init__(self, method: Method, args: argparse.Namespace, exchanging: bool) -> None:
        self.method, self.seconds = method, 0.0
        if args.compute_s:
            self.seconds = args.compute_s[0 if method.name.startswith("resist") else 1]
        self.images = torch.randn(args.batch, 3, 32, 32)
        self.labels = torch.randint(args.num_classes, (args.batch,))
        self.model = Sleeping(method.model, self.seconds) if self.seconds else method.model
        self.exchanging = exchanging
        if exchanging:
            assert isinstance(method, Ddp)
            self.model = method.wrap(self.model)

    def run(self, steps: int) -> None:
        if self.seconds and not self.exchanging:
            time.sleep(self.seconds * steps)
            return
        for _ in range(steps):
            if not self.seconds:
                self.method.optimizer.zero_grad()
            output = self.model(self.images)
            if self.seconds:
                output.sum().backward()  # zero gradients and no step: weights stay; the step is in `seconds`
                continue
            F.cross_entropy(output, self.labels).backward()
            self.method.optimizer.step()  # keep gradients: torch's averager skips parameters without


class Sleeping(nn.Module):
    """The layers of `model`, which sleep instead of computing: a third of `seconds` forward, the rest backward."""

    def __init__(self, model: nn.Module, seconds: float) -> None:
        super().__init__()
        self.model, self.seconds = model, seconds
        self.layers = [layer for module in model.modules() if (layer := list(module.parameters(recurse=False)))]

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds / 3)
        clock = [0.0]
        x = images.new_zeros(1)
        for layer in self.layers:
            x = Layer.apply(x, clock, self.seconds * 2 / 3 / len(self.layers), *layer)
        return x


class Layer(torch.autograd.Function):
    """Identity. Its backward pass sleeps until `seconds` after the previous layer's, and returns zero gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: list[float], seconds: float, *parameters: Tensor) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        ctx.save_for_backward(*parameters)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        clock = ctx.clock
        clock[0] = (clock[0] or time.perf_counter()) + ctx.seconds
        time.sleep(max(0.0, clock[0] - time.perf_counter()))
        return gradient, None, None, *(p.new_zeros(()).expand(p.shape) for p in ctx.saved_tensors)


def collect(hosts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Make one row per method. A round takes as long as its slowest host; bytes are summed over hosts."""
    rows = []
    for entries in zip(*hosts, strict=True):
        rounds = list(zip(*(entry["rounds"] for entry in entries), strict=True))  # rounds[round][host]
        compute = [max(host["compute_s"] for host in one) for one in rounds]
        exchange = [max(host["exchange_s"] for host in one) for one in rounds]
        total = [a + b for a, b in zip(compute, exchange, strict=True)]
        by_host = [sum(one[host]["sent_bytes"] for one in rounds) for host in range(len(entries))]
        row: dict[str, Any] = {"method": entries[0]["method"], "n": len(rounds)}
        for name, values in (("compute_s", compute), ("exchange_s", exchange), ("round_s", total)):
            row[name] = {"median": round(statistics.median(values), 4), "all": [round(value, 4) for value in values]}
        row["wire_bytes"] = [round(sum(host["sent_bytes"] for host in one)) for one in rounds]
        for key in ("ledger_bytes", "formula_bytes"):
            row[key] = [one[0][key] for one in rounds] if rounds[0][0][key] is not None else None
            assert all(host[key] == one[0][key] for one in rounds for host in one), f"hosts disagree on {key}"
        row["busiest_host_over_mean"] = round(max(by_host) * len(by_host) / sum(by_host), 3)
        rows.append(row)
    return rows


def table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    compute = "real compute"
    if args.compute_s:
        compute = f"compute emulated by sleep ({args.compute_note or 'no device named'})"
    lines = [
        f"emulated network: S = {args.workers}, links of {args.rate}, l = {args.local_steps}, n = {args.rounds}",
        compute,
        f"{'method, per round':32} {'compute s':>10} {'exchange s':>10} {'spread':>7} {'round s':>9} {'x first':>8} "
        f"{'wire MB':>10} {'ledger MB':>10} {'= formula':>9} {'wire/payload':>12}",
    ]
    for row in rows:
        wire, ledger, formula = (sum(row[f"{key}_bytes"] or []) for key in ("wire", "ledger", "formula"))
        exchange, payload = row["exchange_s"], ledger or formula
        lines.append(
            f"{row['method']:32} {row['compute_s']['median']:10.3f} {exchange['median']:10.3f} "
            f"{max(exchange['all']) - min(exchange['all']):7.3f} {row['round_s']['median']:9.3f} "
            f"{row['round_s']['median'] / rows[0]['round_s']['median']:8.2f} {wire / row['n'] / 1e6:10.2f} "
            f"{ledger / row['n'] / 1e6 if ledger else float('nan'):10.2f} "
            f"{('yes' if row['ledger_bytes'] == row['formula_bytes'] else 'NO') if ledger else '-':>9} "
            f"{wire / payload if payload else float('nan'):12.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
