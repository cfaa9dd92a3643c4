"""Print the commands that compare wire formats with wire.py, and the seconds that they take.

python benchmarks/wire_plan.py | sh        # as root, on a quiet machine with Linux
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from namespaces import parse_rate
from own import SEED, expected_bytes, strategy_of, wire_of
from resist.blocks.chains import choose_chains
from resist.cost.footprint import build_on_meta
from resist.models import build
from resist.subnet.network import Subnet

# Seconds of a step of the full network: a GPU that sustains 10 TFLOP/s, at batch 128.
FULL_STEP_S = 0.188
NOTE = "a GPU that sustains 10 TFLOP/s, batch 128: 1.88 TFLOP a step of the full network, assumed; a step of the "
NOTE += "sub-network is the share of it that was measured on this processor"
LOCAL_STEPS = 50
SUB_SHARE = 0.51  # as measured, for the estimate only
BEGIN_S, START_S = 40.0, 8.0  # of a command: imports, measured steps; of a method: building it, undisturbed steps
STREAMED = ",wire=int8,fragments=10,delay=2", ",wire=int4,fragments=10,delay=2"
# The fewest bytes: momentum in four bits, and sub-networks that are drawn again every second round.
SELDOM = ",wire=int4/int8/int4,fragments=10,delay=2,redraw_every=2"
RESIST, LOCAL_SGD, DILOCO = "resist,optimizer_state=travel", "local_sgd,optimizer_state=reset", "diloco"
# DiLoCo in fp32 sends what local SGD sends.
FORMATS = (
    *(RESIST + wire for wire in ("", ",wire=int4", *STREAMED, SELDOM)),
    "resist,optimizer_state=reset" + STREAMED[1],
    *(LOCAL_SGD + wire for wire in ("", ",wire=int4", *STREAMED)),
    *(DILOCO + wire for wire in STREAMED),
)


@dataclass(frozen=True)
class Command:
    """One call of wire.py: rate, hosts, rounds to warm up and rounds that are measured, and methods."""

    rate: str
    workers: int
    warm_up: int
    rounds: int
    methods: tuple[str, ...] = FORMATS

    def seconds(self, network: Subnet) -> float:
        """Estimate the seconds that it takes."""
        rounds = self.warm_up + self.rounds
        return BEGIN_S + sum(START_S + rounds * self.round_s(spec, network) for spec in self.methods)

    def round_s(self, spec: str, network: Subnet) -> float:
        """Estimate the seconds of a round: its steps, then its bytes at the line rate."""
        name, *given = spec.split(",")
        options = dict(option.split("=", 1) for option in given)
        strategy = strategy_of(name, self.workers, LOCAL_STEPS, options)
        now, then = (strategy.plan(network.chains, seed=SEED, round=number) for number in range(2))
        sizes = [network.shared.numel(), *(num_bytes // 4 for num_bytes in network.block_bytes)]
        num_bytes = expected_bytes(now, then, sizes, strategy, wire_of(options))
        step_s = FULL_STEP_S * (SUB_SHARE if name == "resist" else 1)
        return LOCAL_STEPS * step_s + num_bytes / self.workers * 8 / parse_rate(self.rate)

    def line(self) -> str:
        """Return it as a line for a shell."""
        options = {"rate": self.rate, "workers": self.workers, "warm-up": self.warm_up, "rounds": self.rounds,
                   "full-step-s": FULL_STEP_S, "compute-note": NOTE}  # fmt: skip
        words = [sys.executable, str(Path(__file__).with_name("wire.py")), "--formats"]
        words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return shlex.join([*words, "--methods", *self.methods])


COMMANDS = (
    # Two hosts have a processor each where there are two; four share them, so that encoding takes longer.
    Command("1gbit", 2, 1, 2, (RESIST, *(name + STREAMED[1] for name in (RESIST, LOCAL_SGD, DILOCO)))),
    Command("1gbit", 4, 1, 2),
    Command("100mbit", 4, 1, 2),
    Command("20mbit", 4, 0, 1, (RESIST, *(RESIST + wire for wire in STREAMED), LOCAL_SGD,
                                *(name + STREAMED[1] for name in (LOCAL_SGD, DILOCO)))),
)  # fmt: skip


def plan() -> str:
    """Return the commands with comments, for a shell."""
    template = build_on_meta(lambda: build("preact_resnet101", num_classes=100, width=64))
    chains = choose_chains(template)
    network = Subnet(template, chains, [chain.num_blocks for chain in chains], device="meta")
    seconds = [command.seconds(network) for command in COMMANDS]
    lines = [f"# Needs root and about {sum(seconds) / 60:.0f} minutes of a quiet machine."]
    for command, each in zip(COMMANDS, seconds, strict=True):
        lines += [f"# about {each:.0f} s", command.line()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(plan())
