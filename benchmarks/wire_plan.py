"""Print the commands that compare wire formats with wire.py, and the seconds that they take.

python benchmarks/wire_plan.py | sh        # as root, on a quiet machine with Linux
"""

import shlex
import sys
from pathlib import Path

from namespaces import parse_rate
from own import OPTIONS, SEED, expected_bytes, strategy_of, wire_of
from resist.blocks.chains import choose_chains
from resist.cost.footprint import build_on_meta
from resist.models import build
from resist.subnet.network import Subnet

# Seconds of a step of the full network: a GPU that sustains 10 TFLOP/s, at batch 128.
FULL_STEP_S = 0.188
NOTE = "a GPU that sustains 10 TFLOP/s, batch 128: 1.88 TFLOP a step of the full network, assumed; a step of the "
NOTE += "sub-network is the share of it that was measured on this processor"
WORKERS, LOCAL_STEPS = 4, 50
SUB_SHARE = 0.51  # as measured, for the estimate only
BEGIN_S, START_S = 40.0, 8.0  # of a command: imports, measured steps; of a method: building it, undisturbed steps
STREAMED = ",wire=int8,fragments=10,delay=2", ",wire=int4,fragments=10,delay=2"
# DiLoCo sends what local SGD sends, and is late in fp32 as it is.
FORMATS = (
    *(f"resist,optimizer_state=travel{wire}" for wire in ("", ",wire=int8", ",wire=int4", *STREAMED)),
    *(f"local_sgd,optimizer_state=reset{wire}" for wire in ("", ",wire=int4", *STREAMED)),
    *(f"diloco{wire}" for wire in STREAMED),
)
RATES = {"1gbit": (1, 2), "100mbit": (1, 2), "20mbit": (0, 1)}  # -> rounds to warm up, and rounds measured


def commands() -> str:
    """Return the commands with comments, for a shell."""
    lines, total = ["set -e"], 0.0
    template = build_on_meta(lambda: build("preact_resnet101", num_classes=100, width=64))
    chains = choose_chains(template)
    network = Subnet(template, chains, [chain.num_blocks for chain in chains], device="meta")
    for rate, (warm_up, rounds) in RATES.items():
        seconds = BEGIN_S + sum(START_S + (warm_up + rounds) * round_s(spec, rate, network) for spec in FORMATS)
        total += seconds
        command = [
            sys.executable,
            str(Path(__file__).with_name("wire.py")),
            "--formats",
            "--rate",
            rate,
            "--warm-up",
            str(warm_up),
            "--rounds",
        ]
        command += [str(rounds), "--full-step-s", str(FULL_STEP_S), "--compute-note", NOTE]
        lines += [f"# about {seconds:.0f} s", shlex.join(command)]
    return "\n".join([f"# Needs root and about {total / 60:.0f} minutes of a quiet machine.", *lines])


def round_s(spec: str, rate: str, network: Subnet) -> float:
    """Estimate the seconds of a round: its steps, then its bytes at the line rate."""
    name, *given = spec.split(",")
    assert name in OPTIONS
    options = dict(option.split("=", 1) for option in given)
    strategy = strategy_of(name, WORKERS, LOCAL_STEPS, options)
    now, then = (strategy.plan(network.chains, seed=SEED, round=number) for number in range(2))
    sizes = [network.shared.numel(), *(num_bytes // 4 for num_bytes in network.block_bytes)]
    num_bytes = expected_bytes(now, then, sizes, strategy, wire_of(options))
    step_s = FULL_STEP_S * (SUB_SHARE if name == "resist" else 1)
    return LOCAL_STEPS * step_s + num_bytes / WORKERS * 8 / parse_rate(rate)


if __name__ == "__main__":
    print(commands())
