"""Measure seconds and bytes of a round over slow links: ResIST and its competitors on emulated hosts.

    python benchmarks/wire.py --rate 100mbit --workers 4 --compute-s 0.095 0.188
    python benchmarks/wire.py --rate 1gbit --workers 2 --depths 1 1 9 1 --width 32 --local-steps 2     # takes seconds

Every worker is a process in its own network namespace (namespaces.py), started with the variables that torch's
launchers set, and uses gloo. This needs Linux, root and iproute2. For the methods see competitors.py.

A round is `--local-steps` steps, then the synchronization of the method.
compute   seconds of the steps, on the slowest host: real steps on random images in fp32, unless `--compute-s SUB FULL`
          gives the seconds of one step of a sub-network and of the full network on another device. Then the hosts
          sleep that long, and the table says so: the ratio of compute to exchange is that of the named device.
          `--full-step-s FULL` is the same, and SUB is FULL times the ratio of their processor time here.
exchange  seconds of the synchronization on the slowest host, after a barrier. DDP communicates within its steps: its
          value is the additional time of these steps, over `--ddp-steps` and scaled to a round. With sleep its
          layers sleep one after another in the backward pass (two thirds of a step), so that it overlaps compute and
          communication as usual.
stall     seconds of a round beyond its steps: compute + exchange - local steps x an undisturbed step, the median of
          some before the first round. Encoding counts. All hosts share this machine's processors, so that it takes
          longer than on machines of their own; `cpu` has the processor seconds of all hosts in a round.
slowed    percent by which steps take longer while an exchange is under way: fragments, that is.
wire      bytes sent by all interfaces in a round, headers included; ledger: payload, counted by this package; formula:
          payload, from the plans alone (for this package) or from the ring (for one all-reduce).

A table is printed (`--json`: the record), and a line of JSON with provenance is appended to
benchmarks/results/wire.jsonl. `--formats` compares wire formats instead, in formats.jsonl: see
wire_plan.py.
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
from torch import nn

from competitors import Ddp, Method, check, make
from namespaces import INTERFACE, CannotEmulateError, Host, network, parse_rate, sent_bytes, sent_headers
from provenance import provenance
from resist import UserError
from resist.models import build
from wire_plan import FORMATS
from wire_steps import Steps, compare_steps

RESULTS = Path(__file__).parent / "results"
UNDISTURBED_STEPS = 10  # of which the median is the undisturbed step
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
    args.methods = args.methods or list(FORMATS if args.formats else METHODS)
    name = "formats" if args.formats else "wire"
    try:
        rate_bit_s = parse_rate(args.rate)
        if args.workers < 2 or args.local_steps < 2 or args.rounds < 1 or args.ddp_steps < 1:
            raise ValueError("workers and local steps must be at least 2, rounds and DDP steps at least 1")
        if args.compute_s and args.full_step_s is not None:
            raise ValueError("give --compute-s or --full-step-s, not both")
        given = [seconds for seconds in (*(args.compute_s or ()), args.full_step_s) if seconds is not None]
        if args.warm_up < 0 or any(seconds <= 0 for seconds in given):
            raise ValueError("rounds to warm up must be at least 0, and seconds of a step above 0")
        check(args.methods, lambda: build_network(args), args.workers, args.local_steps)
        computed = scaled(args)
        with network(args.workers, rate_bit_s) as hosts:
            rows = collect(run(hosts, computed), args.local_steps)
    except (CannotEmulateError, UserError, ValueError) as error:
        print(f"wire.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    left_out = ("as_host", "json", "no_record", "methods", "formats")
    settings = {key: value for key, value in vars(args).items() if key not in left_out}
    record = {"benchmark": name, "emulated": True, **settings, "methods": rows, **provenance(name)}
    print(json.dumps(record) if args.json else table(args, rows))
    if not args.no_record:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{name}.jsonl").open("a") as file:
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
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that are measured")
    parser.add_argument("--ddp-steps", type=int, default=4, help="steps of DDP that are measured in each round")
    parser.add_argument("--compute-s", type=float, nargs=2, metavar=("SUB", "FULL"), help="sleep instead of computing")
    parser.add_argument(
        "--full-step-s",
        type=float,
        metavar="SECONDS",
        help="sleep so long for a step of the full "
        "network, and for one of a sub-network the share of it that is measured on this processor",
    )
    parser.add_argument("--compute-note", default="", help="the device of these seconds; part of the output")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--formats", action="store_true", help="compare wire formats, recorded in formats.jsonl")
    parser.add_argument("--json", action="store_true", help="print the record instead of the table")
    parser.add_argument("--no-record", action="store_true", help="do not append to the results")
    parser.add_argument("--as-host", help=argparse.SUPPRESS)  # the process of one host: the file for its results
    return parser.parse_args()


def build_network(args: argparse.Namespace) -> nn.Module:
    return build(args.model, num_classes=args.num_classes, depths=tuple(args.sections), width=args.width)


def scaled(args: argparse.Namespace) -> list[str]:
    """Measure the steps to sleep for, if they are to be measured; returns arguments for the hosts."""
    arguments = ["--methods", *args.methods]
    if args.full_step_s:
        share = compare_steps(lambda: build_network(args), args.workers, args.batch, args.num_classes)
        args.compute_s = [round(args.full_step_s * share, 5), args.full_step_s]
    if args.compute_s:
        arguments += ["--compute-s", *map(str, args.compute_s)]
    return arguments


def run(hosts: list[Host], arguments: list[str]) -> list[list[dict[str, Any]]]:
    """Return the results of each host, method by method. When one host fails, the others are killed."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank, host in enumerate(hosts):
            group = {"RANK": rank, "WORLD_SIZE": len(hosts), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": 29500}
            local = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": 1}
            quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # the hosts have no names, and torch would warn
            environment = os.environ | {key: str(value) for key, value in (group | local | quiet).items()}
            command = [*host.enter, sys.executable, *sys.argv, *arguments, "--as-host", f"{folder}/{rank}.json"]
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
    """Measure rounds. A barrier between compute and exchange is not counted."""
    ddp = isinstance(method, Ddp)
    steps = min(args.ddp_steps, args.local_steps) if ddp else args.local_steps
    scale = args.local_steps / steps
    steppers = [Steps(method, args, exchanging) for exchanging in ((False, True) if ddp else (False,))]
    dist.barrier()
    undisturbed_s = statistics.median(steppers[0].run(min(UNDISTURBED_STEPS, args.local_steps)))
    method.counted_bytes()  # without those of building it
    rounds: list[dict[str, Any]] = []
    for number in range(-args.warm_up, args.rounds):
        dist.barrier()
        sent, headers, cpu = sent_bytes(), sent_headers(), time.process_time()
        step_s: list[list[float]] = []
        for stepper in steppers:
            dist.barrier()
            step_s.append(stepper.run(steps, method.step))
        dist.barrier()
        start = time.perf_counter()
        method.synchronize()
        exchange_s = time.perf_counter() - start
        dist.barrier()
        sent, headers, cpu = sent_bytes() - sent, sent_headers() - headers, time.process_time() - cpu
        method.tidy()
        if ddp:
            exchange_s = max(0.0, sum(step_s[1]) - sum(step_s[0]))
        busy = [seconds for step, seconds in enumerate(step_s[0], start=1) if step in method.busy_steps]
        expected, counted = method.expected_bytes(), method.counted_bytes()
        entry = {"compute_s": sum(step_s[0]) * scale, "exchange_s": exchange_s * scale, "sent_bytes": sent * scale}
        entry |= {"header_bytes": headers * scale}
        entry |= {"formula_bytes": expected and expected * (args.local_steps if ddp else 1), "ledger_bytes": counted}
        entry |= {"undisturbed_s": undisturbed_s, "busy_s": statistics.fmean(busy) if busy else None, "cpu_s": cpu}
        if number >= 0:
            rounds.append(entry)
    return rounds


def collect(hosts: list[list[dict[str, Any]]], local_steps: int) -> list[dict[str, Any]]:
    """Make one row per method. A round takes as long as its slowest host; bytes are summed over hosts."""
    rows = []
    for entries in zip(*hosts, strict=True):
        rounds = list(zip(*(entry["rounds"] for entry in entries), strict=True))  # rounds[round][host]
        compute = [max(host["compute_s"] for host in one) for one in rounds]
        exchange = [max(host["exchange_s"] for host in one) for one in rounds]
        total = [a + b for a, b in zip(compute, exchange, strict=True)]
        step_s = max(host["undisturbed_s"] for host in rounds[0])
        stall = [seconds - local_steps * step_s for seconds in total]
        cpu = [sum(host["cpu_s"] for host in one) for one in rounds]
        by_host = [sum(one[host]["sent_bytes"] for one in rounds) for host in range(len(entries))]
        row: dict[str, Any] = {"method": entries[0]["method"], "n": len(rounds), "undisturbed_s": round(step_s, 5)}
        for name, values in (("compute_s", compute), ("exchange_s", exchange), ("round_s", total), ("stall_s", stall),
                             ("cpu_s", cpu)):  # fmt: skip
            row[name] = {"median": round(statistics.median(values), 4), "all": [round(value, 4) for value in values]}
        slowed = [max(h["busy_s"] / h["undisturbed_s"] for h in one) for one in rounds if one[0]["busy_s"] is not None]
        row["slowed_percent"] = round(100 * (statistics.median(slowed) - 1), 2) if slowed else None
        for name, key in (("wire_bytes", "sent_bytes"), ("header_bytes", "header_bytes")):
            row[name] = [round(sum(host[key] for host in one)) for one in rounds]
        for key in ("ledger_bytes", "formula_bytes"):
            row[key] = [one[0][key] for one in rounds] if rounds[0][0][key] is not None else None
            assert all(host[key] == one[0][key] for one in rounds for host in one), f"hosts disagree on {key}"
        row["busiest_host_over_mean"] = round(max(by_host) * len(by_host) / sum(by_host), 3)
        rows.append(row)
    return rows


def table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    width = max(len(row["method"]) for row in rows)
    compute = "real compute"
    if args.compute_s:
        compute = f"compute emulated by sleep ({args.compute_note or 'no device named'})"
    lines = [
        f"emulated network: S = {args.workers}, links of {args.rate}, l = {args.local_steps}, n = {args.rounds}",
        compute,
        f"{'method, per round':{width}} {'compute s':>10} {'exchange s':>10} {'spread':>7} {'round s':>9} "
        f"{'x first':>8} {'stall s':>8} {'%':>5} {'slowed %':>8} {'cpu s':>6} {'wire MB':>10} {'ledger MB':>10} "
        f"{'= formula':>9} {'wire/payload':>12}",
    ]
    for row in rows:
        wire, ledger, formula = (sum(row[f"{key}_bytes"] or []) for key in ("wire", "ledger", "formula"))
        exchange, payload = row["exchange_s"], ledger or formula
        seconds, stall, slowed = row["round_s"]["median"], row["stall_s"]["median"], row["slowed_percent"]
        lines.append(
            f"{row['method']:{width}} {row['compute_s']['median']:10.3f} {exchange['median']:10.3f} "
            f"{max(exchange['all']) - min(exchange['all']):7.3f} {seconds:9.3f} "
            f"{seconds / rows[0]['round_s']['median']:8.2f} {stall:8.3f} {100 * stall / seconds:5.1f} "
            f"{'-' if slowed is None else format(slowed, '.1f'):>8} {row['cpu_s']['median']:6.2f} "
            f"{wire / row['n'] / 1e6:10.2f} "
            f"{ledger / row['n'] / 1e6 if ledger else float('nan'):10.2f} "
            f"{('yes' if row['ledger_bytes'] == row['formula_bytes'] else 'NO') if ledger else '-':>9} "
            f"{wire / payload if payload else float('nan'):12.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
