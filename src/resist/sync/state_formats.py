"""Wire formats of optimizer states: which are known, which are never negative, and which go as they are."""

from collections.abc import Collection, Iterable

from torch.optim import Optimizer

from resist.planning.wire import BF16, FP32, LOG8

# Names of torch's optimizers. Others may use the same name for something else, so theirs are unknown. Not in it: the
# exp_avg of Adam and its kin, which is divided by the root of a second moment, number by number. What a format with one
# scale for many numbers adds to a small one would be a large step.
_LINEAR = frozenset({"momentum_buffer"})
_NEVER_NEGATIVE = frozenset(
    {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum"}  # Adam and its kin, RMSprop, Ada*
)
# A centered RMSprop takes the root of square_avg - grad_avg^2. Where gradients vary little, what a format loses of
# either makes that negative.
_VARIANCE = frozenset({"square_avg", "grad_avg"})

LINEAR, NEVER_NEGATIVE, EXACT, UNKNOWN = "linear", "never negative", "exact", "unknown"  # kinds of states


def kind_of(name: str, optimizers: Iterable[type], names: Collection[str]) -> str:
    """Return the kind of an optimizer state.

    Args:
        name: Name of the state.
        optimizers: The classes of a worker's optimizers, which all workers have.
        names: Names of all states that any worker has.
    """
    if name in _VARIANCE and _VARIANCE.issubset(names):
        return EXACT
    if not all(map(_is_torchs, optimizers)):
        return UNKNOWN
    return LINEAR if name in _LINEAR else NEVER_NEGATIVE if name in _NEVER_NEGATIVE else UNKNOWN


def format_of(kind: str, wire: str) -> str:
    """Return the format of a state.

    Args:
        kind: Its kind.
        wire: The format that was chosen for states. One of few bits is `log8` for a state that is never negative, and
            bf16 for one whose small numbers matter as much as its large ones, or that is not known.
    """
    if kind == EXACT:
        return FP32
    if wire in (FP32, BF16) or kind == LINEAR:
        return wire
    return LOG8 if kind == NEVER_NEGATIVE else BF16


def _is_torchs(optimizer: type) -> bool:
    """True for an optimizer of torch, or one that is derived from it."""
    return any(base is not Optimizer and base.__module__.startswith("torch.optim.") for base in optimizer.__mro__)
