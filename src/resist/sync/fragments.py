"""Fragments of a worker's weights: where they are, and what the means of their changes need.

Without streaming there is one fragment, which has everything. What is averaged as changes is numbered through: the
ranges that train of all slots, if they are averaged with the shared part, and of the shared part. So all workers number
it in the same way, wherever it lies in their flat tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist.planning.fragments import Ranges, fragment_strips
from resist.subnet.layout import SubnetLayout
from resist.sync.compressed_mean import Feedback


@dataclass
class Fragment:
    """A part of the weights of one worker.

    Attributes:
        strips: (first number, end) of each of its strips, ascending.
        ranges: (first element, end) of its ranges of the flat tensor, in the same order.
        feedback: Anchor and errors of its numbers.
    """

    strips: Ranges
    ranges: Ranges
    feedback: Feedback

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Return views of its ranges. Writing to them does not count as a change of frozen weights beside them."""
        return [flat.data[start:end] for start, end in self.ranges]

    def read(self, flat: Tensor, into: Tensor | None = None) -> Tensor:
        """Copy its numbers from a flat tensor; to `into`, if it has memory of its own of that size."""
        parts = [*self.parts(flat), flat.data[:0]]
        numel = sum(part.numel() for part in parts)
        if into is None or not into.numel() == numel == into.untyped_storage().nbytes() // into.itemsize:
            return torch.cat(parts)
        return torch.cat(parts, out=into)

    def write(self, flat: Tensor, numbers: Tensor) -> None:
        """Copy numbers to their places in a flat tensor."""
        parts = self.parts(flat)
        for part, own in zip(parts, torch.split(numbers, [part.numel() for part in parts]), strict=True):
            part.copy_(own)


def write_anchors(fragments: Sequence[Fragment], flat: Tensor) -> None:
    """Replace the weights of a flat tensor by what all workers agree on."""
    for fragment in fragments:
        fragment.write(flat, fragment.feedback.anchor)


@torch.no_grad()
def begin_fragments(
    before: Sequence[Fragment],
    layout: SubnetLayout,
    flat: Tensor,
    *,
    blocks: bool,
    count: int,
    agreed: bool,
    copied: bool,
) -> list[Fragment]:
    """Make the fragments of a round from those of the round before.

    Args:
        before: The fragments of the round before.
        layout: Layout of the weights.
        flat: (layout.numel,) the weights that begin the round.
        blocks: Average the blocks with the shared part.
        count: Number of fragments; 0: there is no streaming.
        agreed: All workers have equal weights, which are the anchors. Otherwise anchors stay.
        copied: `flat` is a copy that nobody changes, of which an anchor may be a view.

    Returns:
        The fragments, without empty ones, but for the only one.
    """
    ranges = layout.ranges(blocks=blocks)
    numel, shared = sum(end - start for start, end in ranges), layout.shared.num_trained
    dealt = [strips for strips in fragment_strips(numel, count) if strips] if count else [[(0, numel)]]
    found = [Fragment(strips, _locate(strips, ranges), Feedback(flat.new_empty(0), shared=shared)) for strips in dealt]
    kept = not agreed and bool(before)  # a round between keeps what is numbered
    if len(found) == len(before) and (not count or [f.strips for f in before] == dealt):
        for old, new in zip(before, found, strict=True):
            new.feedback, old.feedback.shared = old.feedback, shared
    else:
        _deal_errors(before, found, numel, shared)
        if kept:
            _deal(_joined(before, lambda feedback: feedback.anchor), found, "anchor")
    for fragment in found if not kept else ():
        view = copied and not count and len(fragment.ranges) == 1
        fragment.feedback.anchor = fragment.parts(flat)[0] if view else fragment.read(flat, fragment.feedback.anchor)
    return found


def _deal_errors(before: Sequence[Fragment], found: Sequence[Fragment], numel: int, shared: int) -> None:
    """Give fragments the errors of others, as far as they are of the same numbers. Pieces are others."""
    if any(fragment.feedback.error is None for fragment in before) or not before:
        return
    errors = _joined(before, lambda feedback: feedback.error)
    if errors.numel() != numel:
        known = min(shared, before[0].feedback.shared, errors.numel())
        errors = torch.cat([errors.new_zeros(numel - known), errors[errors.numel() - known :]])
    _deal(errors, found, "error")


def _joined(fragments: Sequence[Fragment], value: Callable[[Feedback], Tensor | None]) -> Tensor:
    """Numbers of all fragments, in their order."""
    pieces: list[tuple[int, Tensor]] = []
    for fragment in fragments:
        numbers = value(fragment.feedback)
        assert numbers is not None
        if len(fragment.strips) == 1:  # the only one; it may have fewer numbers than at the round's beginning
            pieces.append((fragment.strips[0][0], numbers))
            continue
        sizes = [end - start for start, end in fragment.strips]
        pieces += zip([start for start, _ in fragment.strips], torch.split(numbers, sizes), strict=True)
    return torch.cat([numbers for _, numbers in sorted(pieces, key=lambda piece: piece[0])])


def _deal(numbers: Tensor, fragments: Sequence[Fragment], name: str) -> None:
    for fragment in fragments:
        setattr(fragment.feedback, name, torch.cat([numbers[start:end] for start, end in fragment.strips]))


def _locate(strips: Ranges, ranges: Ranges) -> Ranges:
    """Find strips of what is numbered through in the ranges of a flat tensor."""
    found: Ranges = []
    for first, last in strips:
        passed = 0
        for start, end in ranges:
            low, high = max(first, passed), min(last, passed + end - start)
            if low < high:
                found.append((start + low - passed, start + high - passed))
            passed += end - start
    return found
