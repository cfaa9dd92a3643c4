"""Goodput of members that come and go: four processes, a fault every 30 seconds, this package and torchft.

    python benchmarks/elastic.py                          # as root: takes 26 minutes, appends to results/elastic.jsonl
    python benchmarks/elastic.py --seconds 90 --every 20 --undisturbed 20 --no-record
    python benchmarks/elastic.py --methods resist --wire int4 --fragments 4 --seconds 90 --every 15 --no-record

Four processes train on this machine (elastic_members.py), in steps of a stated length. After a time without faults, one
of them is hit every `--every` seconds, at a moment drawn within a round: SIGKILL, SIGSTOP for longer than the heartbeat
allows, an exception, or all its TCP connections shut down; each kind once in four faults, in an order that is drawn.
The same seed gives each method the same faults. A process that has ended is replaced at once, one that was stopped
when it stops; a new Python process takes seconds to import torch.

goodput   images trained and kept / images that are trained in this time without faults: the rate of the
          `--undisturbed` seconds before and after.
pause     the longest time that a survivor was without a step, beyond the usual time between two rounds.

One that was stopped longer than is allowed has to leave when it wakes. torchft would take it back as a fifth replica,
so there it is killed while it is stopped, when the others have gone on. Both methods lose a silent process after
`--bound-s`, which is torchft's default; ours is twice as long.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import itertools
import json
import os
import random
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic_figures import between, defects, goodput, judged, kept_images, named, repeats, usual_gap
from provenance import provenance

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "elastic.jsonl"
KINDS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "exception": signal.SIGUSR1,
         "connections cut": signal.SIGUSR2}  # fmt: skip
METHODS = ("resist", "torchft")
START_S, END_S, AWAKE_S, GONE_S = 180.0, 60.0, 5.0, 15.0  # bounds of waiting; of leaving after SIGCONT; after others
NEW_NETWORK, NEW_NAMES = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS


class Run:
    """The processes of one method, and what they wrote.

    Args:
        method: One of METHODS.
        args: Options of the command line.
        folder: For messages of the processes.
        settings: What the processes are given, without the method's own.
    """

    def __init__(self, method: str, args: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> None:
        self.method, self.args, self.folder = method, args, folder
        self.events: list[dict[str, Any]] = []
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.stop = folder / f"{method}-stop"
        self.stop.unlink(missing_ok=True)
        self.settings = {**settings, "stop": str(self.stop)}
        self.faults: list[dict[str, Any]] = []
        self._reader, self._writer = os.pipe()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with open(self._reader, encoding="utf-8") as lines:
            for line in lines:
                self.events.append(json.loads(line))

    def start(self) -> int:
        """Start one process; returns its number."""
        number = len(self.processes)
        settings = self.settings | {"replaces": number >= self.args.members}
        command = [sys.executable, str(HERE / "elastic_members.py"), self.method, json.dumps(settings)]
        with (self.folder / f"{self.method}-{number}.txt").open("wb") as errors:
            process = subprocess.Popen(command, stdout=self._writer, stderr=errors)
        self.processes[process.pid] = process
        return process.pid

    def present(self) -> list[int]:
        """Return the processes that live and are members, in the order of their start."""
        members = {event["pid"] for event in named(self.events, "member")}
        return [pid for pid, process in self.processes.items() if pid in members and process.poll() is None]

    def until(self, moment: float, what: str = "") -> None:
        """Sleep until a moment. `what` must then be true of the members, or the run fails."""
        time.sleep(max(0.0, moment - time.monotonic()))
        if what:
            raise SystemExit(f"{self.method}: {what}; see {self.folder}")

    def wait_for(self, condition: Any, seconds: float, what: str) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                self.until(0.0, f"{what} within {seconds:g} s")
            time.sleep(0.1)

    def hit(self, kind: str, draw: float, began: float) -> threading.Thread:
        """Bring one fault on a process; what becomes of it is followed in a thread."""
        present = self.present()
        victim = present[int(draw * len(present))]
        fault = {"kind": kind, "pid": victim, "at": time.monotonic(), "at_s": round(time.monotonic() - began, 1),
                 "survivors": [pid for pid in present if pid != victim], "replaced": [], "ended": ""}  # fmt: skip
        self.faults.append(fault)
        os.kill(victim, KINDS[kind])
        thread = threading.Thread(target=self._follow, args=(fault,), daemon=True)
        thread.start()
        return thread

    def _follow(self, fault: dict[str, Any]) -> None:
        process = self.processes[fault["pid"]]
        if fault["kind"] == "SIGSTOP":
            fault["replaced"].append(self.start())
            time.sleep(self.args.bound_s + 3)
            if self.method == "torchft":
                process.kill()
                fault["ended"] = "killed while stopped"
            else:
                process.send_signal(signal.SIGCONT)
                fault["ended"] = self._left(process, AWAKE_S, "left when it woke")
            return
        if fault["kind"] == "connections cut" and self.method == "torchft":
            end = time.monotonic() + GONE_S
            while time.monotonic() < end and process.poll() is None:
                if any(e["at"] > fault["at"] + 1 and e["pid"] == process.pid for e in named(self.events, "round")):
                    fault["ended"] = "went on"
                    return
                time.sleep(0.1)
        fault["ended"] = self._left(process, GONE_S, "ended")
        fault["replaced"].append(self.start())

    def _left(self, process: subprocess.Popen[bytes], seconds: float, how: str) -> str:
        begin = time.monotonic()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"had to be killed after {seconds:g} s"
        return f"{how} ({time.monotonic() - begin:.1f} s)"

    def finish(self) -> None:
        """Let the members end together, and wait for them."""
        rounds = max(event["round"] for event in named(self.events, "round"))
        new = self.stop.with_suffix(".new")
        new.write_text(str(rounds + 3))
        new.rename(self.stop)
        self.wait_for(lambda: not self.present(), END_S, "the members did not end")
        time.sleep(0.5)  # the last lines

    def kill(self) -> None:
        """End all processes."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        os.close(self._writer)


def punish(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Run one method through the time without faults and the time with faults; returns its figures."""
    for _ in range(args.members):
        run.start()
    run.wait_for(lambda: len(run.present()) == args.members, START_S, "the members were not complete")
    rounds = len(named(run.events, "round"))
    run.wait_for(lambda: len(named(run.events, "round")) > rounds + 2 * args.members, START_S, "no rounds were done")
    quiet = time.monotonic(), time.monotonic() + args.undisturbed
    sent = sent_bytes()
    run.until(quiet[1])
    sent = sent_bytes() - sent
    faulty, draws, threads = (quiet[1], quiet[1] + args.seconds), random.Random(args.seed), []
    deck: list[str] = []
    round_s = args.local_steps * args.step_s
    for number in range(int(args.seconds // args.every)):
        deck = deck or draws.sample(list(KINDS), len(KINDS))
        kind, moment, draw = deck.pop(), draws.uniform(0, round_s), draws.random()
        run.until(faulty[0] + number * args.every + moment)
        run.wait_for(lambda: len(run.present()) > 1, START_S, "too few members were left")
        threads.append(run.hit(kind, draw, faulty[0]))
        print(f"{run.method}: {kind} after {run.faults[-1]['at_s']} s", file=sys.stderr, flush=True)
    run.until(faulty[1])
    for thread in threads:
        thread.join()
    run.wait_for(lambda: len(run.present()) == args.members, START_S, "the members were not complete again")
    after = time.monotonic(), time.monotonic() + args.undisturbed
    run.until(after[1])
    run.finish()
    return figures(run, args, (quiet, after), faulty, sent)


def figures(
    run: Run, args: argparse.Namespace, quiet: Sequence[tuple[float, float]], faulty: tuple[float, float], sent: int
) -> dict[str, Any]:
    """Return the figures of one method."""
    events = sorted(run.events, key=lambda event: event["at"])
    kept, usual_s = kept_images(events, args.batch), usual_gap(events, quiet[0])
    ends = [*(fault["at"] for fault in run.faults[1:]), faulty[1]]
    faults = [judged(fault, events, usual_s, until) for fault, until in zip(run.faults, ends, strict=True)]
    seconds, _ = between(kept, *quiet[0])
    rounds = sum(quiet[0][0] <= at <= quiet[0][1] for at, _ in kept) - 1
    rates = [images / duration for duration, images in (between(kept, *period) for period in quiet)]
    absent = sum(fault["back_s"] or 0.0 for fault in faults)
    busy = [event["busy_s"] for event in named(events, "step")]
    peaks = {event["pid"]: event["peak_mb"] for event in named(events, "round")}
    return {
        "method": run.method, "goodput_percent": round(goodput(kept, quiet, faulty), 2), "faults": faults,
        "repeated": len(repeats(events)), "replacements": len(run.processes) - args.members,
        "absent_percent": round(100 * absent / (args.members * args.seconds), 2),
        "undisturbed_images_s": [round(rate, 1) for rate in rates],
        "round_s": round(seconds / rounds, 3), "usual_gap_s": round(usual_s, 3),
        "round_mb": round(sent / args.undisturbed * seconds / rounds / 1e6, 3) if sent else None,
        "peak_mb": round(max(peaks.values()), 1),
        "before_mb": round(statistics.median(event["peak_mb"] for event in named(events, "ready")), 1),
        "busy_s": round(statistics.median(busy), 4),
        "late_percent": round(100 * sum(seconds > args.step_s for seconds in busy) / len(busy), 2),
        "defects": defects(events),
    }  # fmt: skip


@contextlib.contextmanager
def served(method: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Serve what the members of a method meet at; yields the settings for it."""
    if method == "resist":
        from resist.members.secret import read_secret
        from resist.members.store_server import StoreServer

        os.environ["RESIST_SECRET"] = secrets.token_hex()
        server = StoreServer("127.0.0.1", 0, read_secret())
        yield {"port": server.port}
        server.close()
    else:
        from torchft.coordination import LighthouseServer

        lighthouse = LighthouseServer(
            bind="[::]:0", min_replicas=2, join_timeout_ms=10000, quorum_tick_ms=100,
            heartbeat_timeout_ms=int(1000 * args.bound_s),
        )  # fmt: skip
        yield {"lighthouse": f"http://localhost:{lighthouse.address().rpartition(':')[2]}"}
        lighthouse.shutdown()


def own_network() -> bool:
    """Move this process to a network of its own, whose loopback interface nobody else uses; False if that fails."""
    if ctypes.CDLL(None).unshare(NEW_NETWORK | NEW_NAMES) != 0:
        return False
    socket.sethostname("localhost")  # other names would have addresses of other interfaces
    return subprocess.run(["ip", "link", "set", "lo", "up"]).returncode == 0


def sent_bytes() -> int:
    """Return the bytes that the loopback interface has sent, headers included; 0 if others use it."""
    if not os.environ.get("RESIST_OWN_NETWORK"):
        return 0
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[9])


def table(record: dict[str, Any]) -> str:
    """Return the figures as text."""
    lines = [f"{'method':8} {'goodput %':>9} {'MB/round':>8} {'peak MB':>8} {'repeated':>8} {'replaced':>8}  pauses"]
    for row in record["methods"]:
        kinds = itertools.groupby(sorted(row["faults"], key=lambda f: f["kind"]), key=lambda f: f["kind"])
        pauses = []
        for kind, faults in kinds:
            seconds = [fault["pause_s"] for fault in faults]
            pauses.append(f"{kind} {statistics.median(seconds):.2f} (max {max(seconds):.2f})")
        lines.append(
            f"{row['method']:8} {row['goodput_percent']:9.2f} {row['round_mb'] or 0:8.3f} {row['peak_mb']:8.1f} "
            f"{row['repeated']:8} {row['replacements']:8}  {', '.join(pauses)}"
        )
        lines += [f"         DEFECT: {defect}" for defect in row["defects"]]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="the time with faults")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two faults")
    parser.add_argument("--undisturbed", type=float, default=60.0, help="seconds without faults, before")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--step-s", type=float, default=0.1, help="the length of a step")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--depths", type=int, nargs=4, default=[1, 1, 13, 1], metavar="BLOCKS")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--wire", default="fp32", help="format of what is sent (of this package)")
    parser.add_argument(
        "--fragments",
        type=int,
        default=0,
        help="parts of the shared part that are averaged within the round (of this package)",
    )
    parser.add_argument("--bound-s", type=float, default=5.0, help="seconds after which a silent process is lost")
    parser.add_argument("--missed", type=int, default=5, help="heartbeats in this time (of this package)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-record", action="store_true", help="do not append to the results")
    parser.add_argument("--events", type=Path, help="folder to leave the events and messages of the processes in")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if "torchft" in args.methods:
        try:
            importlib.import_module("torchft.manager")
        except ImportError as error:
            raise SystemExit(f"elastic.py: torchft cannot be imported ({error}); pip install torchft==0.2.0") from None
    if own_network():
        os.environ |= {"RESIST_OWN_NETWORK": "1", "GLOO_SOCKET_IFNAME": "lo"}
    else:
        print("elastic.py: no network of its own (root is needed): bytes are not counted", file=sys.stderr)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "src")}
    settings = {key: value for key, value in vars(args).items() if key not in ("methods", "no_record", "events")}
    rows = []
    with contextlib.ExitStack() as stack:
        folder = args.events or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for method in args.methods:
            with served(method, args) as own:
                run = Run(method, args, folder, settings | own)
                try:
                    rows.append(punish(run, args))
                finally:
                    run.kill()
                    if args.events:
                        events = "".join(json.dumps(event) + "\n" for event in run.events)
                        (folder / f"{method}-events.jsonl").write_text(events)
    torchft = importlib.metadata.version("torchft") if "torchft" in args.methods else None
    record = {"benchmark": "elastic", **settings, "torchft": torchft, "methods": rows, **provenance("elastic")}
    print(table(record))
    if not args.no_record:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
