"""The pause of the survivors when one of four members is lost: killed, stopped, or behind a link that goes down.

    sudo .venv/bin/python benchmarks/pauses.py --repeats 5

Four network namespaces on this machine are the hosts, with links of 1 Gbit/s; host 0 also runs `resist rendezvous`. The
members average 4 MB again and again. The pause is from the loss to the end of the first average of the survivors.
"""

import argparse
import os
import secrets
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from namespaces import Host, network

FAULTS = ("SIGKILL", "SIGSTOP", "link down")
MEMBERS, PORT = 4, 29400
FLOATS = 1_000_000


def member(host: str) -> None:
    """Average with the others until one is lost, go on with the rest, and print the time of the first average."""
    import torch
    from torch.distributed import PrefixStore

    from resist.errors import WorkerLostError
    from resist.members.generations import connect_members, regroup
    from resist.members.membership import Membership
    from resist.members.secret import read_secret
    from resist.members.store_client import SecretStore

    def workers(generation: object) -> int:
        return len(generation.members)  # type: ignore[attr-defined]

    torch.set_num_threads(1)
    membership = Membership(PrefixStore("run", SecretStore(host, PORT, read_secret())), {})
    membership.join(expected=MEMBERS)
    _, transport = connect_members(membership, dict, workers)
    tensor = torch.ones(FLOATS)
    print("ready", flush=True)
    try:
        while True:
            transport.mean([tensor], "shared").finish()
    except WorkerLostError:
        generation, transport = regroup(membership, transport, {}, workers)
    transport.mean([tensor], "shared").finish()
    print(time.monotonic(), len(generation.members), flush=True)
    transport.all_gather_text("done")
    transport.close()
    membership.leave()


def measure(hosts: list[Host], fault: str) -> list[float]:
    """The pause of each survivor in seconds."""
    hub = hosts[0].namespace.rpartition("-")[0] + "-hub"
    environment = os.environ | {"RESIST_SECRET": secrets.token_hex(), "OMP_NUM_THREADS": "1"}
    environment["GLOO_SOCKET_IFNAME"] = "eth0"
    serve = [sys.executable, "-m", "resist", "rendezvous", "--bind", hosts[0].address, "--port", str(PORT)]
    started = [subprocess.Popen(hosts[0].enter + serve, env=environment, stdout=subprocess.DEVNULL)]
    command = [sys.executable, __file__, "--member", hosts[0].address]
    members = [
        subprocess.Popen(
            host.enter + command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for host in hosts
    ]
    started += members
    try:
        assert all(process.stdout and process.stdout.readline() == "ready\n" for process in members)
        time.sleep(2)  # some averages, and the members know each other's ports
        lost = members[-1]
        start = time.monotonic()
        if fault == "link down":
            subprocess.run(["ip", "-n", hub, "link", "set", f"port{len(hosts) - 1}", "down"], check=True)
        else:
            os.kill(lost.pid, getattr(signal, fault))
        answers = [process.stdout.readline().split() for process in members[:-1] if process.stdout]
        assert all(left == str(MEMBERS - 1) for _, left in answers), answers
        return [float(moment) - start for moment, _ in answers]
    finally:
        for process in started:
            process.kill()
            process.wait()
        subprocess.run(["ip", "-n", hub, "link", "set", f"port{len(hosts) - 1}", "up"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="losses of each kind")
    parser.add_argument("--member", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        member(options.member)
        return
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
    with network(MEMBERS, 1e9) as hosts:
        for fault in FAULTS:
            pauses = [max(measure(hosts, fault)) for _ in range(options.repeats)]
            shown = ", ".join(f"{pause:.2f}" for pause in sorted(pauses))
            print(
                f"{fault}: {statistics.median(pauses):.2f} s (median of the slowest survivor; all: {shown})", flush=True
            )


if __name__ == "__main__":
    main()
