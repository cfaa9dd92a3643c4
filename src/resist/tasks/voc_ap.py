"""Average precision as PascalVOC defines it, over detections and true objects of any number of images.

Of each class, the detections of all images are gone through from the highest score to the lowest. A detection goes to
the object of its class and image that it overlaps most. Where that overlap (intersection over union) is below 0.5 the
detection is false; where the object is marked as difficult the detection does not count at all; else it is right if it
is the first on that object, and false if the object was found before: one detection for each object.

    precision = right / (right + false)        recall = right / objects that are not difficult

Precision at a recall is read as the best at that recall or above. AP is its mean at the recalls 0, 0.1, ..., 1
(VOC 2007, 11 points), or the area under it (VOC 2010 and later). The score of a test set is the mean over the classes
that have an object which is not difficult.

COCO's AP50 differs: it reads precision at 101 recalls, lets a detection try the best object that is not taken yet where
VOC calls it false, and counts only the best 100 detections of an image.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", 2010.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

MIN_OVERLAP = 0.5
TRUE, FALSE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Truth:
    """The objects in an image. boxes: (objects, 4), left, top, right, bottom; labels: (objects,) int64;
    difficult: (objects,) bool."""

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


@dataclass(frozen=True)
class Found:
    """What a detector says of an image. boxes: (detections, 4); labels: (detections,) int64; scores: (detections,)."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor


class AveragePrecision:
    """Takes image after image, and gives the APs of all."""

    def __init__(self) -> None:
        self._objects: dict[int, int] = {}  # by class, difficult ones left out
        self._scores: dict[int, list[Tensor]] = {}
        self._outcomes: dict[int, list[Tensor]] = {}

    def add(self, found: Found, truth: Truth) -> None:
        """Count one image. All tensors on the host."""
        for label in truth.labels[~truth.difficult].tolist():
            self._objects[label] = self._objects.get(label, 0) + 1
        for label in found.labels.unique().tolist():
            mine, theirs = found.labels == label, truth.labels == label
            scores, order = found.scores[mine].float().sort(descending=True, stable=True)
            outcome = outcomes(found.boxes[mine][order], truth.boxes[theirs], truth.difficult[theirs])
            self._scores.setdefault(label, []).append(scores)
            self._outcomes.setdefault(label, []).append(outcome)

    def by_class(self, points: int | None) -> dict[int, float]:
        """AP, 0 to 1, of each class that has an object which is not difficult. points: as in `ap`."""
        found: dict[int, float] = {}
        for label, objects in sorted(self._objects.items()):
            outcome = torch.zeros(0, dtype=torch.int8)
            if label in self._scores:
                order = torch.cat(self._scores[label]).argsort(descending=True, stable=True)
                outcome = torch.cat(self._outcomes[label])[order]
            found[label] = ap(outcome, objects, points)
        return found

    def mean(self, points: int | None) -> float:
        """The mean over classes; 0 where there is no class to take it of."""
        found = self.by_class(points)
        return sum(found.values()) / len(found) if found else 0.0


def outcomes(boxes: Tensor, objects: Tensor, difficult: Tensor) -> Tensor:
    """What becomes of the detections of one class in one image. (detections,) int8: TRUE, FALSE or IGNORED.

    boxes: (detections, 4), the highest score first; objects: (objects, 4); difficult: (objects,).
    """
    result = torch.full((len(boxes),), FALSE, dtype=torch.int8)
    if not len(objects):
        return result
    overlap, best = box_iou(boxes.double(), objects.double()).max(dim=1)
    enough = overlap >= MIN_OVERLAP
    result[enough & difficult[best]] = IGNORED
    hits = (enough & ~difficult[best]).nonzero().flatten().numpy()
    _, first = np.unique(best.numpy()[hits], return_index=True)
    result[torch.from_numpy(hits[first])] = TRUE
    return result


def ap(outcome: Tensor, objects: int, points: int | None) -> float:
    """Average precision, 0 to 1.

    outcome: (detections,) of one class over all images, the highest score first. objects: how many there are to find.
    points:  read precision at so many recalls, evenly from 0 to 1 (11 for VOC 2007); None: the area (VOC 2010 on).
    """
    counted = outcome[outcome != IGNORED].numpy() == TRUE
    right = np.cumsum(counted)
    precision = right / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or above
    if points is None:
        return float(best[counted].sum() / objects)  # recall rises by 1 / objects at each right detection
    # Recall reaches k / (points - 1) where right * (points - 1) >= k * objects: in whole numbers, so that no rounding
    # of 0.3 decides.
    where = np.searchsorted(right * (points - 1), np.arange(points) * objects, side="left")
    return float(np.append(best, 0.0)[where].sum() / points)
