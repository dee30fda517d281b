"""Merging against loops over single boxes."""

import math

import pytest
import torch

from fiber_d2.modeling.merging import METHODS, in_size_range, merge_detections


def make_detections(num, num_classes=3, seed=0, ties=False):
    """Crowded boxes; with ``ties`` corners and scores on a coarse grid."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(shape, generator=generator)

    corner, size = rand(num, 2) * 40, rand(num, 2) * 50 + 10
    scores = rand(num) * 0.9 + 0.05
    if ties:
        corner, size, scores = corner.round(), size.round(), (scores * 8).round() / 8
    classes = torch.randint(0, num_classes, (num,), generator=generator)
    return torch.cat([corner, corner + size], dim=1), scores, classes


def iou(a, b, one):
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + one, 0) * max(y2 - y1 + one, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    if min(a[2], b[2]) - max(a[0], b[0]) + one <= 0 or min(a[3], b[3]) - max(a[1], b[1]) + one <= 0:
        common = 0
    return common / (area(*a) + area(*b) - common)


def plainly(boxes, scores, classes, method, threshold, *, one=1, min_score=0.05, sigma=None):
    """The definition, box by box: rows of (class, score, box), by class, then score."""
    rows = []
    for label in sorted(set(classes.tolist())):
        here = classes == label
        left = [[s, b] for s, b in zip(scores[here].tolist(), boxes[here].tolist())]
        found = []
        while left:
            best = max(range(len(left)), key=lambda i: left[i][0])
            score, box = left[best]
            overlaps = [iou(box, b, one) for _, b in left]
            others = [i for i in range(len(left)) if i != best]
            if method == "nms":
                found.append((score, box))
                left = [left[i] for i in others if not overlaps[i] > threshold]
            elif method == "soft-nms":
                found.append((score, box))
                for i in others:
                    if sigma is not None:
                        left[i][0] *= math.exp(-(overlaps[i] ** 2) / sigma)
                    elif overlaps[i] > threshold:
                        left[i][0] *= 1 - overlaps[i]
                left = [left[i] for i in others if left[i][0] >= min_score]
            else:
                members = [i for i in range(len(left)) if overlaps[i] >= threshold]
                total = sum(left[i][0] for i in members)
                mean = [sum(left[i][0] * left[i][1][k] for i in members) / total for k in range(4)]
                found.append((score, mean))
                if method == "soft-vote":
                    lowered = [(left[i][0] * (1 - overlaps[i]), left[i][1]) for i in members]
                    found += [entry for entry in lowered if entry[0] >= min_score]
                left = [left[i] for i in others if i not in members]
        rows += [(label, *entry) for entry in sorted(found, key=lambda entry: -entry[0])]
    return rows


def assert_rows(found, rows):
    boxes, scores, classes = found
    assert classes.tolist() == [row[0] for row in rows]
    torch.testing.assert_close(scores, torch.tensor([row[1] for row in rows]))
    torch.testing.assert_close(boxes, torch.tensor([row[2] for row in rows]).reshape(-1, 4))


@pytest.mark.parametrize("legacy", [True, False], ids=["inclusive", "plain"])
@pytest.mark.parametrize("threshold", [0.4, 0.6, 0.95])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_its_definition(method, threshold, legacy):
    for seed, (num, num_classes) in enumerate([(60, 3), (40, 1), (7, 5), (1, 1)]):
        given = make_detections(num, num_classes, seed)
        found = merge_detections(
            *given,
            method=method,
            threshold=threshold,
            max_detections=0,
            soft_nms_min_score=0.05,
            legacy=legacy,
        )
        assert_rows(found, plainly(*given, method, threshold, one=int(legacy)))


def test_gaussian_soft_suppression():
    given = make_detections(50)
    found = merge_detections(
        *given, method="soft-nms", max_detections=0, soft_nms_min_score=0.02, soft_nms_sigma=0.5
    )
    expected = plainly(*given, "soft-nms", 0.6, min_score=0.02, sigma=0.5)
    assert_rows(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores(method):
    """The same box twice, and boxes apart with the same score, have one answer."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [50, 0, 59, 9], [0, 0, 9, 9], [50, 50, 59, 59]])
    scores, classes = torch.full((4,), 0.5), torch.tensor([1, 1, 1, 0])
    found = merge_detections(boxes, scores, classes, method=method)
    assert found[2].tolist() == [0, 1, 1]
    assert sorted(found[0].tolist()) == sorted(boxes[1:].tolist())
    assert found[1].tolist() == [0.5] * 3


@pytest.mark.parametrize("method", METHODS)
def test_overlap_of_exactly_the_threshold(method):
    """Voting joins at the threshold; suppression begins beyond it."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4]])
    scores, classes = torch.tensor([0.75, 0.25]), torch.zeros(2, dtype=torch.int64)
    found = merge_detections(boxes, scores, classes, method=method, threshold=0.5)
    assert_rows(found, plainly(boxes, scores, classes, method, 0.5))
    assert len(found[0]) == (1 if method == "vote" else 2)


@pytest.mark.parametrize("method", METHODS)
def test_nothing(method):
    empty = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    boxes, scores, classes = merge_detections(*empty, method=method)
    assert boxes.shape == (0, 4) and scores.shape == classes.shape == (0,)
    assert (boxes.dtype, scores.dtype, classes.dtype) == (torch.float32, torch.float32, torch.int64)


def test_boxes_without_an_area_or_score():
    boxes = torch.tensor([[5.0, 5, 5, 5], [0, 0, 9, 9], [5, 5, 5, 5]])
    scores, classes = torch.tensor([0.0, 0.5, 0.0]), torch.zeros(3, dtype=torch.int64)
    for legacy in (True, False):
        found = merge_detections(boxes, scores, classes, method="vote", legacy=legacy)
        assert found[0][:2].tolist() == [[0, 0, 9, 9], [5, 5, 5, 5]]


def test_limit_keeps_ties_and_order_is_a_choice():
    boxes, scores, classes = make_detections(80, 4, ties=True)
    rows = plainly(boxes, scores, classes, "nms", 0.6)
    for limit in range(1, len(rows) + 2):
        cut = sorted((row[1] for row in rows), reverse=True)[min(limit, len(rows)) - 1]
        expected = [row for row in rows if row[1] >= cut]
        given = boxes, scores, classes
        assert_rows(merge_detections(*given, max_detections=limit), expected)
        found = merge_detections(*given, max_detections=limit, by_score=True)
        assert_rows(found, sorted(expected, key=lambda row: -row[1]))


def test_large_groups_are_voted_on_in_parts(monkeypatch):
    given = make_detections(60)
    whole = merge_detections(*given, method="soft-vote")
    monkeypatch.setattr("fiber_d2.modeling.merging._MAX_ENTRIES", 20)
    for one, other in zip(merge_detections(*given, method="soft-vote"), whole):
        torch.testing.assert_close(one, other)


def test_size_range():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 10], [3, 3, 22, 22], [0, 0, 19, 18]])
    assert in_size_range(boxes, (10, 20)).tolist() == [False, True, False, True]
    assert in_size_range(boxes, (9, 19), legacy=False).tolist() == [False, True, False, True]
    assert in_size_range(boxes[:0], (0, 1)).tolist() == []


def test_options_that_do_not_exist():
    given = make_detections(3)
    with pytest.raises(ValueError, match="'weighted'; it must be one of nms, soft-nms"):
        merge_detections(*given, method="weighted")
    for threshold in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match="threshold is"):
            merge_detections(*given, threshold=threshold)
