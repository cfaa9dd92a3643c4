"""Chain: the record of a run of interchangeable residual blocks, and the names of its parts.

A block is one child of a container, or `period` neighboring ones where children of several classes alternate (attention
and MLP, local and global, with and without experts). `resist.blocks.chains` finds chains.

A sub-network has a chain in one of two forms:

- `COMPACT`: the container has only the blocks that are held, one after another. Modules, their names and the order of
  parameters stay the same from round to round.
- `IN_PLACE`: the container has its full length. The blocks that are held are at their true positions, and a `Bypass`
  without parameters is at each other one. This is right for networks that take their blocks by name or index, or give
  them other values by position. From round to round the modules of the slots move to the positions of the blocks that
  they hold, so names change, and `torch.compile` compiles again; modules, parameters and optimizer references stay.
"""

from dataclasses import dataclass, field, replace

from torch import nn

from resist.blocks import residual
from resist.blocks.compatibility import Varying
from resist.blocks.streams import Stream

COMPACT, IN_PLACE = "compact", "in_place"


@dataclass(frozen=True)
class Branch:
    """A module of a block whose branch is scaled in the full network.

    Attributes:
        member: Number of the block's member that it is in.
        path: Dotted name within the member; "" is the member itself.
        skip_type: Type of its skip connection, one of the constants of `resist.blocks.residual`. `OUTSIDE`: the network
            adds its output to the hidden state.
    """

    member: int
    path: str
    skip_type: str


@dataclass(frozen=True)
class Chain:
    """A run of interchangeable blocks: children `first` to `last` of a container.

    Attributes:
        container: Dotted name of the container, any module; "" if it is the model itself.
        first: Position of the first block's first child among the container's children, from 0.
        last: Position of the last block's last child, included.
        keys: Names of all children of the container.
        skip_type: Type of the blocks' skip connections, one of the constants of `resist.blocks.residual`. Not compared.
        varying: Attributes that differ along the chain, with their value in each block. Not compared.
        period: Children of a block.
        by_name: True if the container is neither an `nn.Sequential` nor an `nn.ModuleList`, so that its children may be
            called by their names. The chain's name then has theirs.
        branches: Modules of a block that are scaled. Default: each of its children. Not compared.
        form: `COMPACT` or `IN_PLACE`. Not compared.
        bypasses: For each block, a module for each of its children that stands at their positions where the block is
            not held; () if the form `IN_PLACE` is not possible. Not compared.
        streams: Places of the hidden state, by the name of the module that is scaled, where they are not the default
            ones. Not compared.
        noted: Attributes whose change during training has been said. Not compared.
    """

    container: str
    first: int
    last: int
    keys: tuple[str, ...]
    skip_type: str = field(default=residual.UNKNOWN, compare=False)
    varying: tuple[Varying, ...] = field(default=(), compare=False)
    period: int = 1
    by_name: bool = False
    branches: tuple[Branch, ...] = field(default=(), compare=False)
    form: str = field(default=COMPACT, compare=False)
    bypasses: tuple[tuple[nn.Module, ...], ...] = field(default=(), compare=False, repr=False)
    streams: tuple[tuple[str, Stream], ...] = field(default=(), compare=False)
    noted: set[str] = field(default_factory=set[str], compare=False, repr=False)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return (self.last - self.first + 1) // self.period

    @property
    def name(self) -> str:
        """Name of the chain: `layer3:1-22`, `layers:0-11/2` with blocks of two children, `encoder:block0-block7`."""
        first, last = (self.keys[i] if self.by_name else str(i) for i in (self.first, self.last))
        return f"{self.container}:{first}-{last}" + (f"/{self.period}" if self.period > 1 else "")

    def members(self, block: int) -> tuple[str, ...]:
        """Return the global dotted names of the children that form a block.

        Args:
            block: Number of the block.

        Returns:
            `period` names.
        """
        start = self.first + block * self.period
        prefix = f"{self.container}." if self.container else ""
        return tuple(f"{prefix}{key}" for key in self.keys[start : start + self.period])

    @property
    def all_members(self) -> list[str]:
        """Global dotted names of the children of all blocks."""
        return [name for block in range(self.num_blocks) for name in self.members(block)]

    def block_name(self, block: int) -> str:
        """Return the global dotted name of a block.

        Args:
            block: Number of the block.

        Returns:
            Its name: `layer3.1` for block 0 of layer3:1-22. The name of no module if a block is several children;
            `members` has theirs.
        """
        return "+".join(self.members(block))

    def tensor_name(self, block: int, piece: str) -> str:
        """Return the global dotted name of a tensor.

        Args:
            block: Number of the block.
            piece: Its name within the block, from `piece`.

        Returns:
            Its name in the full network.
        """
        member, _, inner = ("0", "", piece) if self.period == 1 else piece.partition(".")
        return f"{self.members(block)[int(member)]}.{inner}"

    def piece(self, member: int, inner: str) -> str:
        """Return the name of a tensor within a block, equal for all blocks of the chain.

        Args:
            member: Number of the member.
            inner: Dotted name within the member.

        Returns:
            The name: `inner` if a block is one child; else the member's number comes first.
        """
        return inner if self.period == 1 else f"{member}.{inner}"

    def bypass(self, index: int) -> nn.Module:
        """Return the module that stands in place of a child of a block that is not held.

        Args:
            index: Position among the container's children.

        Returns:
            The module; to be copied.
        """
        return self.bypasses[(index - self.first) // self.period][(index - self.first) % self.period]

    def scaled(self, block: int) -> tuple[tuple[str, str], ...]:
        """List the modules of a block that are scaled in the full network, or bypassed without the block.

        Args:
            block: Number of the block.

        Returns:
            (global dotted name, type of the skip connection) of each.
        """
        members = self.members(block)
        branches = self.branches or tuple(Branch(number, "", self.skip_type) for number in range(self.period))
        return tuple((f"{members[b.member]}.{b.path}".rstrip("."), b.skip_type) for b in branches)

    def part(self, first: int, last: int) -> "Chain":
        """Cut out a shorter chain.

        Args:
            first: Position of its first child among the container's children, where a block begins.
            last: Position of its last child, included, where a block ends.

        Returns:
            The chain, with those attributes that differ among its blocks.
        """
        start, end = (first - self.first) // self.period, (last - self.first + 1) // self.period
        varying = tuple(filter(None, (attribute.part(start, end) for attribute in self.varying)))
        bypasses = self.bypasses[start:end]
        return replace(self, first=first, last=last, varying=varying, bypasses=bypasses, noted=set[str]())

    @property
    def caveat(self) -> str:
        """Limitation of scaling this chain's branches; "" if it is exact."""
        if self.skip_type == residual.RELU:
            return (
                f"the blocks of {self.name} end in a ReLU, relu(x + f(x)): the full network uses "
                "x + scale * (block(x) - x); that is relu(x + scale * f(x)) except where x + f(x) < 0, where it is "
                "(1 - scale) * x, which is larger"
            )
        if self.skip_type == residual.NORM:
            return (
                f"the blocks of {self.name} end in a norm, norm(x + f(x)): the full network uses "
                "x + scale * (block(x) - x), a mean of two normalized states that is not itself normalized, as "
                "norm(x + scale * f(x)) would be"
            )
        return ""
