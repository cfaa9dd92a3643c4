"""Mixed images: mixup and CutMix of torchvision.transforms.v2, as a function of (seed, worker, step)."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from resist.data.loader import seeded
from resist.data.sampler import Sampler
from resist.planning.plan import keyed_int


class LabeledBatches(Protocol):
    """Training batches of a worker: images (batch, channels, height, width) and labels (batch,) int64."""

    def batch(self, step: int, /) -> tuple[Tensor, Tensor]: ...


class Mixed:
    """Training batches whose images and labels are mixed.

    Each image is mixed with its neighbor, and its label as much.

    One share is drawn for each batch. With both `mixup` and `cutmix`, each batch has one of the two at random.

    Args:
        loader: The batches to mix.
        sampler: Its sampler, which has the key of the random draws.
        num_classes: Number of classes.
        mixup: Parameter of the Beta distribution of the share of the other image; 0: no mixup.
        cutmix: The same for the area that is pasted from the other image; 0: no CutMix.
    """

    def __init__(
        self, loader: LabeledBatches, sampler: Sampler, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0
    ) -> None:
        from torchvision.transforms import v2  # its import takes seconds

        transforms: list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
        if mixup:
            transforms.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            transforms.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
        self._loader, self._sampler = loader, sampler
        self._mix = v2.RandomChoice(transforms) if len(transforms) > 1 else transforms[0]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step.

        Returns:
            Images (batch, channels, height, width), and for each its share of the classes, (batch, num_classes).
        """
        images, labels = self._loader.batch(step)
        with seeded(keyed_int("mix", self._sampler.seed, self._sampler.worker, step)):
            return self._mix(images, labels)
