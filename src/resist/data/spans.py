"""Batches of images in order: which images each one has, and which process takes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


def spans(num: int, size: int) -> list[range]:
    """Divide `num` images into batches.

    A last batch of one image would be normalized by that image alone, which BatchNorm refuses where a feature map is a
    single pixel. So it is part of the batch before it.

    Args:
        num: Number of images.
        size: Images in a batch. The last one has fewer, or one more.

    Returns:
        The indices of each batch.
    """
    starts = list(range(0, num, size))
    if size > 1 and len(starts) > 1 and num - starts[-1] == 1:
        starts.pop()
    return [range(start, end) for start, end in pairwise([*starts, num])] if starts else []


@dataclass(frozen=True)
class Share:
    """The part of a test that a process does: consecutive batches, as many as every other process has, or one more.

    Attributes:
        index: Number of the process.
        count: Number of processes.
    """

    index: int = 0
    count: int = 1

    def of(self, batches: Sequence[range]) -> Sequence[range]:
        """Return the batches of this process."""
        num = len(batches)
        return batches[self.index * num // self.count : (self.index + 1) * num // self.count]


WHOLE = Share()
