"""Wire formats: what numbers look like on the way to another worker, and how many bytes they take.

Numbers are encoded in groups with one scale each, so that a few large ones do not take the precision of all others:

| format | bits | code | bytes of n numbers |
| --- | ---: | --- | --- |
| fp32 | 32 | as it is | 4 n |
| bf16 | 16 | rounded | 2 n |
| int8, int6, int4 | 8, 6, 4 | multiples of the group's largest magnitude / (127, 31, 7) | n bits / 8 + 4 a group |
| log4 | 4 | sign and 3 bits of exponent: 0 and ± largest x 2^0, 2^-1 .. 2^-6 | n / 2 + 4 a group |
| log8 | 8 | for numbers that are never negative: 0 and largest x 2^(-k / 6), k = 0 .. 254 | n + 4 a group |

Four numbers of int6 are three bytes. `log8` keeps every number within 6 % down to 2^-42 of the largest of its group and
never turns a positive one into zero: it is for second moments, by whose roots a step is divided.
"""

from dataclasses import dataclass

from resist.errors import UserError
from resist.planning.fragments import Times, fragment_sizes, fragment_times
from resist.planning.whole import check_whole


@dataclass(frozen=True)
class Format:
    """A wire format.

    Attributes:
        name: Its name, as in the table above.
        bits: Bits of a number, without scales.
        group: Numbers that share a scale; 0: there are no scales. A multiple of the numbers that are packed together.
    """

    name: str
    bits: int
    group: int = 0

    def num_bytes(self, numel: int) -> int:
        """Return the bytes of `numel` numbers, scales included. The last group is a whole one."""
        if not self.group:
            return numel * self.bits // 8
        return -(-numel // self.group) * (4 + self.group * self.bits // 8)

    def pieces(self, numel: int, workers: int) -> list[int]:
        """Cut numbers into one piece for each worker, in whole groups.

        Args:
            numel: How many numbers.
            workers: Number of pieces.

        Returns:
            Numbers of each piece: equally many, but fewer or none in the last ones.
        """
        unit = self.group or ALIGNED
        size = -(-numel // (workers * unit)) * unit
        return [min(size, max(numel - worker * size, 0)) for worker in range(workers)]


ALIGNED = 16  # a piece without groups is a multiple of this

FP32, BF16, LOG8 = "fp32", "bf16", "log8"
# Sizes of the groups, measured on weights, changes and momentum of a ResNet101: int8 in groups of 256 has 0.55 to 0.8
# times the error of groups of 1,024, for 1.2 % more bytes and no more time. Groups of 64 give 4 bits 0.9 times the
# error for 6 % more bytes. The error of log8 does not depend on them.
FORMATS = {
    format.name: format
    for format in (
        Format(FP32, 32),
        Format(BF16, 16),
        Format("int8", 8, 256),
        Format("int6", 6, 256),
        Format("int4", 4, 128),
        Format("log4", 4, 128),
        Format(LOG8, 8, 1024),
    )
}
# Formats of each part. The change of the shared part carries its error to the next round, so that any will do; blocks
# and state are sent by value, and an error stays.
CHOICES = {
    "shared": (FP32, BF16, "int8", "int6", "int4", "log4"),
    "blocks": (FP32, BF16, "int8", "int6"),
    "state": (FP32, BF16, "int8", "int6", "int4"),
}


@dataclass(frozen=True)
class Wire:
    """Wire formats of a job.

    Only numbers in single precision are encoded, or cut into fragments: parameters that train, and what is laid out as
    they are. Running statistics and other buffers, frozen parameters and other dtypes go as they are, at the end of the
    round.

    Attributes:
        shared: Of the shared part, of which the change since the beginning of the round is sent; what a code loses is
            added to the change of the next round. Also of blocks, if every worker holds every block.
        blocks: Of blocks that are averaged or handed over, of their replicas, and of an outer momentum. Rounded
            stochastically, so that the error is zero on average.
        state: Of the optimizer's state, by value, rounded stochastically. Second moments, which are never negative, go
            as `log8` for fewer than 16 bits, Adam's `exp_avg` and states that are not known as "bf16"; those of a
            centered RMSprop, of whose difference it takes the root, as they are.
        fragments: Number of fragments of the shared part, each of which is averaged at a time of its own in the round,
            while training goes on; 0: all of it at the round's end. Also of blocks, if every worker holds every block.
        delay: Steps from the beginning of a fragment's mean to its end.

    Raises:
        UserError: If a part cannot have a format, or a number is out of range.
    """

    shared: str = FP32
    blocks: str = FP32
    state: str = FP32
    fragments: int = 0
    delay: int = 1

    def __post_init__(self) -> None:
        for part, choices in CHOICES.items():
            if (value := getattr(self, part)) not in choices:
                raise UserError(f"`wire`: {part}={value!r} is not one of {', '.join(choices)}")
        check_whole("fragments", self.fragments, least=0)
        check_whole("delay", self.delay, least=1)
        if self.delay > 1 and not self.fragments:
            raise UserError(f"`delay={self.delay}` has no effect without `fragments`; give them, or remove it")

    @property
    def compresses(self) -> bool:
        """True if anything is encoded."""
        return any(format != FP32 for format in self.formats.values())

    @property
    def sends_changes(self) -> bool:
        """True if the shared part is sent as changes to an anchor: encoded, or in fragments."""
        return self.shared != FP32 or self.fragments > 0

    @property
    def formats(self) -> dict[str, str]:
        """Format of each part, for JSON."""
        return {part: getattr(self, part) for part in CHOICES}

    def times(self, local_steps: int) -> list[Times]:
        """Return when each fragment is averaged in a round; see `resist.planning.fragments.fragment_times`."""
        return fragment_times(local_steps, self.fragments, self.delay)

    @property
    def average(self) -> str:
        """Format of averages of the weights over time, by value."""
        return FP32 if self.blocks == FP32 else BF16


def part_bytes(format: str, numel: int, trained: int, itemsize: int) -> int:
    """Compute the bytes of a block, or of another part, on the wire.

    Args:
        format: Name of the format of the numbers that train.
        numel: Numbers of the part.
        trained: Those of them that train. The others go as they are.
        itemsize: Bytes of a number as it is.
    """
    if format == FP32:
        return numel * itemsize
    return FORMATS[format].num_bytes(trained) + (numel - trained) * itemsize


def fragment_bytes(format: str, numel: int, fragments: int) -> list[int]:
    """Compute the bytes of each fragment on the wire.

    In single precision there is one number more: how many workers count.

    Args:
        format: Name of the format.
        numel: Numbers of all fragments.
        fragments: How many there are.
    """
    more = 1 if format == FP32 else 0
    return [FORMATS[format].num_bytes(size + more) for size in fragment_sizes(numel, fragments)]


# One name for all three parts.
WIRES = {
    FP32: Wire(),
    BF16: Wire(BF16, BF16, BF16),
    "int8": Wire("int8", BF16, "int8"),
    "int6": Wire("int6", "int8", "int8"),
    "int4": Wire("int4", "int8", "int8"),
}


def as_wire(wire: "str | Wire") -> Wire:
    """Return the formats that a name stands for.

    Args:
        wire: A name in `WIRES`, or the formats themselves.

    Raises:
        UserError: There is none of this name.
    """
    if isinstance(wire, Wire):
        return wire
    if not isinstance(wire, str) or wire not in WIRES:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"`wire={wire!r}` is not one of {', '.join(WIRES)}; or give a resist.Wire")
    return WIRES[wire]
