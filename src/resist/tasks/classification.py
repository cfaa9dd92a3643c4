"""Image classification: cross entropy, and the share of test images whose class is given the highest score."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy. logits: (batch, classes); labels: (batch,) int64. Returns a scalar."""
    return F.cross_entropy(logits, labels)


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share, 0 to 1, of images in `batches` that `model` puts into their class."""
    right = total = 0
    for images, labels in batches:
        right += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    return right / total
