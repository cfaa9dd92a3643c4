"""Interface of a task: data, network, loss and metric.

The training loop knows nothing else about images, boxes or classes. The type of a batch is the task's own.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resist.data.sampler import Sampler
from resist.data.spans import WHOLE, Share
from resist.subnet.calibration import NumberedBatches
from resist.subnet.statistics import Processes


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

    def to(self, device: torch.device | str, *, channels_last: bool | None = None) -> "Task":
        """Return the same task with batches on `device`.

        Args:
            device: Device of the batches.
            channels_last: Memory format of the images that enter the network; default: as before.
        """
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

    @property
    def test_images(self) -> tuple[int, int, int]:
        """Numbers of images in the calibration, in a test, and in the largest batch of both."""
        ...

    def calibration(self, seed: int) -> NumberedBatches:
        """Return inputs for `model(batch)` on which BatchNorm statistics are estimated."""
        ...

    def test(self, model: nn.Module, processes: Processes | None = None) -> dict[str, float]:
        """Compute the scores of a full network on the test images.

        Args:
            model: The network.
            processes: The processes that have this network, and test a share of the batches each; all of them call
                this, and get the scores that one process alone gets. Default: this process alone.

        Returns:
            Scores by name, 0 to 1, the main one first.
        """
        ...

    def digest(self) -> str:
        """Return a hash of the data."""
        ...


def gathered(processes: Processes | None, measure: Callable[[Share], Tensor]) -> list[Tensor]:
    """Measure something on the test images, each process on its share of the batches.

    Args:
        processes: The processes that take part; None: this process alone.
        measure: Measures on a share.

    Returns:
        The results on the CPU, in the order of the batches.
    """
    if processes is None:
        return [measure(WHOLE).cpu()]
    share = Share(processes.index, processes.count)
    return [part.cpu() for part in processes.gather(lambda: measure(share))]
