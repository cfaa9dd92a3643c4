"""Average precision (AP) as defined by PascalVOC.

The detections of a class in all images are processed from the highest score to the lowest. Each is assigned to the
object of its class and image that it overlaps most. If that overlap (intersection over union) is below 0.5, the
detection is a false positive. If the object is marked as difficult, the detection is ignored. Otherwise the first
detection of an object is a true positive, and every later one a false positive.

    precision = true positives / (true + false positives)        recall = true positives / objects not difficult

The precision at a recall is the best one at that recall or above. AP is its mean at the recalls 0, 0.1, ..., 1
(VOC 2007, 11 points), or the area under it (VOC 2010 and later). The score of a test set is the mean over the classes
that have an object which is not difficult.

COCO's AP50 differs: it takes precision at 101 recalls, assigns a detection to the best object that is still free where
VOC counts a false positive, and uses only the best 100 detections of an image.

Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", 2010.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from resist.data.annotation import Objects

MIN_OVERLAP = 0.5
TRUE, FALSE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Found:
    """Detections in an image.

    Attributes:
        boxes: (detections, 4): left, top, right, bottom.
        labels: (detections,) int64: class numbers.
        scores: (detections,).
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


class AveragePrecision:
    """Accumulate the detections of many images and compute their average precision."""

    def __init__(self) -> None:
        self._objects: dict[int, int] = {}  # number of objects by class, without difficult ones
        self._scores: dict[int, list[Tensor]] = {}
        self._outcomes: dict[int, list[Tensor]] = {}

    def add(self, found: Found, objects: Objects) -> None:
        """Add an image's detections and true objects, all on the CPU."""
        for label in objects.labels[~objects.difficult].tolist():
            self._objects[label] = self._objects.get(label, 0) + 1
        for label in found.labels.unique().tolist():
            detected, actual = found.labels == label, objects.labels == label
            scores, order = found.scores[detected].float().sort(descending=True, stable=True)
            outcome = outcomes(found.boxes[detected][order], objects.boxes[actual], objects.difficult[actual])
            self._scores.setdefault(label, []).append(scores)
            self._outcomes.setdefault(label, []).append(outcome)

    def by_class(self, points: int | None) -> dict[int, float]:
        """Compute the AP, 0 to 1, of each class with countable objects.

        Args:
            points: Recalls at which precision is taken, see `ap`.
        """
        scores: dict[int, float] = {}
        for label, num_objects in sorted(self._objects.items()):
            outcome = torch.zeros(0, dtype=torch.int8, device="cpu")
            if label in self._scores:
                order = torch.cat(self._scores[label]).argsort(descending=True, stable=True)
                outcome = torch.cat(self._outcomes[label])[order]
            scores[label] = ap(outcome, num_objects, points)
        return scores

    def mean(self, points: int | None) -> float:
        """Compute the mean of `by_class`; 0 if there are no classes."""
        scores = self.by_class(points)
        return sum(scores.values()) / len(scores) if scores else 0.0


def outcomes(boxes: Tensor, objects: Tensor, difficult: Tensor) -> Tensor:
    """Classify an image's detections of one class: TRUE, FALSE or IGNORED.

    Args:
        boxes: (detections, 4): the detected boxes, highest score first.
        objects: (objects, 4): boxes of the true objects.
        difficult: (objects,) bool.

    Returns:
        (detections,) int8.
    """
    result = torch.full((len(boxes),), FALSE, dtype=torch.int8, device="cpu")
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
    """Compute the average precision of one class, 0 to 1.

    Args:
        outcome: (detections,) over all images, highest score first: TRUE, FALSE or IGNORED.
        objects: Number of true objects that are not difficult, at least 1.
        points: Number of recalls, evenly from 0 to 1, at which precision is taken (11 for VOC 2007); None: the area
            under the curve (VOC 2010 and later).
    """
    counted = outcome[outcome != IGNORED].numpy() == TRUE
    num_true = np.cumsum(counted)
    precision = num_true / np.arange(1, len(num_true) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or above
    if points is None:
        return float(best[counted].sum() / objects)  # recall rises by 1 / objects at each true positive
    # Recall reaches k / (points - 1) where num_true * (points - 1) >= k * objects: compared in integers, so that the
    # rounding of a recall such as 0.3 does not matter.
    positions = np.searchsorted(num_true * (points - 1), np.arange(points) * objects, side="left")
    return float(np.append(best, 0.0)[positions].sum() / points)
