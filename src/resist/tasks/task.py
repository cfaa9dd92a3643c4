"""Interface of a task: data, network, loss and metric.

The training loop knows nothing else about images, boxes or classes. The type of a batch is the task's own.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resist.data.sampler import Sampler


class Batches(Protocol):
    """Training batches of a worker, a function of (seed, worker, step)."""

    def batch(self, step: int) -> Any:
        """Return a step's batch on the device; consecutive steps are fastest."""
        ...


class Task(Protocol):
    """A network, its data, its loss and its metric."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines for the user before training, such as files left out."""
        ...

    @property
    def num_images(self) -> int:
        """Number of training images."""
        ...

    def network(self) -> nn.Module:
        """Build the full network with its initial weights."""
        ...

    def to(self, device: torch.device | str) -> "Task":
        """Return the same task with batches on `device`."""
        ...

    def batches(self, sampler: Sampler) -> Batches:
        """Return the training batches of one worker, with the images that its sampler draws."""
        ...

    def split(self, batch: Any, parts: int) -> Sequence[Any]:
        """Split a batch into `parts` equal ones, for gradient accumulation."""
        ...

    def loss(self, model: Callable[..., Any], batch: Any) -> Tensor:
        """Compute the mean loss of a model in train mode, a scalar."""
        ...

    def calibration(self, seed: int) -> Iterable[Any]:
        """Iterate over inputs for `model(batch)` on which BatchNorm statistics are estimated."""
        ...

    def test(self, model: nn.Module) -> dict[str, float]:
        """Compute the scores of a full network on the test images.

        Returns:
            Scores by name, 0 to 1, the main one first.
        """
        ...

    def digest(self) -> str:
        """Return a hash of the data."""
        ...
