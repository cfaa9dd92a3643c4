import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist.data.annotation import Objects
from resist.tasks.voc_ap import AveragePrecision, Found, ap

Box = tuple[float, float, float, float]


def truth(*objects: tuple[int, Box, bool]) -> Objects:
    return Objects(
        torch.tensor([box for _, box, _ in objects], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([label for label, _, _ in objects], dtype=torch.int64),
        torch.tensor([difficult for _, _, difficult in objects], dtype=torch.bool),
    )


def found(*detections: tuple[int, Box, float]) -> Found:
    return Found(
        torch.tensor([box for _, box, _ in detections], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([label for label, _, _ in detections], dtype=torch.int64),
        torch.tensor([score for _, _, score in detections], dtype=torch.float32),
    )


def measured(images: Sequence[tuple[Found, Objects]]) -> AveragePrecision:
    result = AveragePrecision()
    for one in images:
        result.add(*one)
    return result


A: Box = (0, 0, 10, 10)
B: Box = (20, 0, 30, 10)
C: Box = (40, 0, 50, 10)
D: Box = (60, 0, 70, 10)


def test_a_case_computed_by_hand() -> None:
    """Five objects that count, one difficult. In order of score: right, false (a second one on A), not counted (on the
    difficult D), right, false (overlap 1/3), right.
    precision 1, 1/2, 2/3, 2/4, 3/5 at recall 1/5, 1/5, 2/5, 2/5, 3/5; read as the best from there on 1, 2/3, 3/5."""
    first = found((1, A, 0.9), (1, A, 0.8), (1, D, 0.7), (1, B, 0.6), (1, (45, 0, 55, 10), 0.5))
    images = [
        (first, truth((1, A, False), (1, B, False), (1, C, False), (1, D, True))),
        (found((1, A, 0.4)), truth((1, (0, 0, 10, 5), False), (1, B, False))),  # overlap exactly 1/2
    ]
    result = measured(images)
    assert result.by_class(None) == {1: pytest.approx((1 + 2 / 3 + 3 / 5) / 5)}
    # Recalls 0, .1, .2 read 1; .3 and .4 read 2/3; .5 and .6 read 3/5; above that nothing is found.
    assert result.by_class(11) == {1: pytest.approx((3 * 1 + 2 * 2 / 3 + 2 * 3 / 5) / 11)}


def test_a_recall_that_is_reached_exactly_is_reached() -> None:
    """3 of 10 is a recall of 0.3, whatever 3 * 0.1 is."""
    assert ap(torch.tensor([1, 1, 1], dtype=torch.int8), 10, 11) == pytest.approx(4 / 11)


def test_the_mean_is_over_classes_with_something_to_find() -> None:
    images = [(found((1, A, 0.9), (3, B, 0.9)), truth((1, A, False), (2, B, False), (4, C, True)))]
    assert measured(images).by_class(None) == {1: 1.0, 2: 0.0}
    assert measured(images).mean(11) == 0.5
    assert measured([]).mean(11) == 0.0
    assert measured([(found(), truth())]).mean(None) == 0.0


coordinates = st.integers(0, 6).map(float)
boxes = st.tuples(coordinates, coordinates, st.integers(1, 4), st.integers(1, 4)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@st.composite
def image_sets(draw: st.DrawFn) -> list[tuple[Found, Objects]]:
    """Images with objects and detections of two classes, all scores different."""
    num = draw(st.integers(1, 3))
    images, scores = [], draw(st.permutations(range(1, 19)))
    for image in range(num):
        objects = draw(st.lists(st.tuples(st.integers(1, 2), boxes, st.booleans()), max_size=5))
        detections = draw(st.lists(st.tuples(st.integers(1, 2), boxes), max_size=6))
        with_scores = [(*one, scores[6 * image + i] / 20) for i, one in enumerate(detections)]
        images.append((found(*with_scores), truth(*objects)))
    return images


def overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return common / (area - common)


def by_the_book(images: Sequence[tuple[Found, Objects]], label: int, points: int | None) -> float | None:
    """The definition, detection by detection."""
    detections = [
        (score, i, tuple(box))
        for i, (found, _) in enumerate(images)
        for score, box, class_number in zip(
            found.scores.tolist(), found.boxes.tolist(), found.labels.tolist(), strict=True
        )
        if class_number == label
    ]
    objects = [
        [
            (tuple(box), difficult)
            for box, one, difficult in zip(t.boxes.tolist(), t.labels.tolist(), t.difficult.tolist(), strict=True)
            if one == label
        ]
        for _, t in images
    ]
    total = sum(not difficult for image in objects for _, difficult in image)
    if not total:
        return None
    taken: set[tuple[int, int]] = set()
    right = false = 0
    curve: list[tuple[float, float]] = []
    for _, i, box in sorted(detections, reverse=True):
        overlaps = [overlap(box, one) for one, _ in objects[i]]
        best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
        if best is not None and overlaps[best] >= 0.5:
            if objects[i][best][1]:
                continue
            if (i, best) not in taken:
                taken.add((i, best))
                right += 1
                curve.append((right / total, right / (right + false)))
                continue
        false += 1
        curve.append((right / total, right / (right + false)))

    def at(recall: float) -> float:
        return max((p for r, p in curve if r >= recall - 1e-9), default=0.0)

    if points is None:
        return sum(at((k + 1) / total) for k in range(total)) / total
    return sum(at(k / (points - 1)) for k in range(points)) / points


@given(images=image_sets(), points=st.sampled_from([None, 11, 101]))
def test_the_definition_detection_by_detection_gives_the_same(images, points) -> None:
    result = measured(images).by_class(points)
    for label in (1, 2):
        expected = by_the_book(images, label, points)
        assert result.get(label) == (None if expected is None else pytest.approx(expected))


@given(images=image_sets())
def test_laws(images) -> None:
    area, eleven = measured(images).mean(None), measured(images).mean(11)
    assert 0 <= area <= 1
    assert 0 <= eleven <= 1
    assert measured(images[::-1]).mean(None) == pytest.approx(area)
    worse = [(found((1, (90, 90, 99, 99), 0.001), (2, (90, 90, 99, 99), 0.001)), truth()), *images]
    assert measured(worse).mean(None) == pytest.approx(area)  # what comes last cannot hurt what was found before
    first = [(found((1, (90, 90, 99, 99), 0.999), (2, (90, 90, 99, 99), 0.999)), truth()), *images]
    assert measured(first).mean(None) <= area
    for _, objects in images:
        mirror = measured([(Found(objects.boxes, objects.labels, torch.ones(len(objects.labels))), objects)])
        pairs = zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True)
        if len({(*box, label) for box, label in pairs}) == len(objects.labels):
            assert all(value == 1.0 for points in (None, 11) for value in mirror.by_class(points).values())


def coco_ap50(images: Sequence[tuple[Found, Objects]]) -> dict[int, float]:
    pytest.importorskip("pycocotools", reason="COCO's own evaluation is compared with where it is installed")
    metric = pytest.importorskip("torchmetrics.detection", reason="as above").MeanAveragePrecision(
        class_metrics=True, iou_thresholds=[0.5]
    )
    for detections, objects in images:
        metric.update(
            [{"boxes": detections.boxes, "scores": detections.scores, "labels": detections.labels}],
            [{"boxes": objects.boxes, "labels": objects.labels, "iscrowd": objects.difficult.int()}],
        )
    result = metric.compute()
    values = result["map_per_class"].reshape(-1).tolist()
    return dict(zip(result["classes"].reshape(-1).tolist(), values, strict=True))


def scattered(seed: int) -> list[tuple[Found, Objects]]:
    """Objects that lie apart, each found once or not at all, false detections elsewhere, none difficult: COCO and VOC
    then agree on what is right."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(6):
        objects, detections = [], []
        for cell in range(12):
            x, y = 100.0 * (cell % 4), 100.0 * (cell // 4)
            label = 1 + cell % 2
            size = 40 + 40 * torch.rand(2, generator=generator)
            box = (x, y, x + float(size[0]), y + float(size[1]))
            roll, score = torch.rand(2, generator=generator).tolist()
            if roll < 0.85:
                objects.append((label, box, False))
            by = 4 * torch.rand(2, generator=generator)
            moved = (box[0] + float(by[0]), box[1] + float(by[1]), box[2] + float(by[0]), box[3] + float(by[1]))
            if roll > 0.2:  # of 0.85 to 1 there is no object
                detections.append((label, moved, score))
        images.append((found(*detections), truth(*objects)))
    return images


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries that only this test uses
@pytest.mark.parametrize("seed", range(3))
def test_cocos_own_evaluation_gives_the_same_at_101_points(seed: int) -> None:
    images = scattered(seed)
    ours, coco = measured(images).by_class(101), coco_ap50(images)
    assert ours.keys() == coco.keys()
    for label, value in coco.items():
        assert ours[label] == pytest.approx(value, abs=1e-6)
        assert 0.2 < value < 0.95
        # The three readings of one curve are near one another, and not the same.
        assert math.isclose(measured(images).by_class(None)[label], value, abs_tol=0.02)
        assert measured(images).by_class(11)[label] != pytest.approx(value, abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_where_coco_differs_by_definition() -> None:
    """The second detection overlaps A most, which is taken: false for VOC. COCO gives it the other object."""
    near: Box = (4, 0, 14, 10)
    images = [(found((1, A, 0.9), (1, (1, 0, 11, 10), 0.8)), truth((1, A, False), (1, near, False)))]
    assert measured(images).by_class(101)[1] == pytest.approx(51 / 101)
    assert coco_ap50(images)[1] == pytest.approx(1.0)
