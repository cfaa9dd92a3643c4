"""What a task has to say to be trained: its data, its network, its loss and its metric.

The training loop knows no more of images, boxes or classes than this. What a batch is belongs to the task.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Batches(Protocol):
    """The training batches of one worker: a pure function of (seed, worker, step)."""

    @property
    def images_per_epoch(self) -> int:
        """Images in one pass through what the worker draws from."""
        ...

    def batch(self, step: int) -> Any:
        """The batch of this step, on the device. Fastest where steps are asked for one after another."""
        ...


class Task(Protocol):
    """A network with data to train it on. `test` gives its scores by name, 0 to 1, the one that counts first."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines for the user before the training: files that were left out, and the like."""
        ...

    def network(self) -> nn.Module:
        """The full network, with fresh weights."""
        ...

    def to(self, device: torch.device | str) -> "Task":
        """The same, its batches on this device."""
        ...

    def batches(self, *, batch_size: int, seed: int, worker: int, workers: int, sampling: str) -> Batches: ...

    def split(self, batch: Any, parts: int) -> Sequence[Any]:
        """The batch in `parts` equal ones, for gradient accumulation."""
        ...

    def loss(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """The mean loss of a network (in train mode, compiled or not) over a batch, a scalar."""
        ...

    def calibration(self, seed: int) -> Iterable[Any]:
        """Training batches to estimate BatchNorm statistics on; `model(batch)` is called with each."""
        ...

    def test(self, model: nn.Module) -> dict[str, float]:
        """The scores of a full network on the images kept apart for testing."""
        ...

    def digest(self) -> str:
        """A short text that differs where the data do."""
        ...
