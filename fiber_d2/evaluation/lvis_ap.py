"""Average precision by the rules of LVIS.

An LVIS image is annotated for some classes only, so a detection counts only where the image is
known to show its class, or not to show it. The rest of the rules are COCO's. Letters in shapes:
N detections, of which D are of one class, G objects, A area ranges, T IoU thresholds, R recall
levels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask

from fiber_d2.evaluation.lvis_data import LVISDetections, LVISGroundTruth, has_area

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_LEVELS = np.linspace(0.0, 1.0, 101)
# Both bounds are inclusive, so that an object may belong to two ranges.
AREA_RANGES = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
# Detections matched at a time; bounds the memory for candidates.
_BLOCK = 10_000
# Name of a metric: IoU threshold (None: mean over all), area range, frequency of the classes.
_PRECISIONS = {
    "AP": (None, "all", None),
    "AP50": (0.5, "all", None),
    "AP75": (0.75, "all", None),
    "APs": (None, "small", None),
    "APm": (None, "medium", None),
    "APl": (None, "large", None),
    "APr": (None, "all", "r"),
    "APc": (None, "all", "c"),
    "APf": (None, "all", "f"),
}
_RECALLS = {"AR": "all", "ARs": "small", "ARm": "medium", "ARl": "large"}


@dataclass(frozen=True)
class _Matches:
    """What each of N detections is good for, before it is said which of them count.

    Attributes:
        slot: int64 ``(N,)``, place in the following arrays; -1: overlaps no object enough.
        matched: bool ``(A, T, n)``, found an object.
        void: bool ``(A, T, n)``, found one that is ignored.
    """

    slot: np.ndarray
    matched: np.ndarray
    void: np.ndarray

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``matched`` and ``void`` (A, T, D) of some detections."""
        slots = self.slot[rows]
        near = slots >= 0
        matched, void = np.zeros((2, *self.matched.shape[:2], len(rows)), dtype=bool)
        matched[..., near] = self.matched[..., slots[near]]
        void[..., near] = self.void[..., slots[near]]
        return matched, void


def average_precision(
    truth: LVISGroundTruth, detections: LVISDetections, subsets: Sequence[np.ndarray]
) -> list[tuple[dict[str, float], np.ndarray]]:
    """AP, AP50, AP75, APs/m/l, APr/c/f, AR and ARs/m/l, in 0..1, of subsets of the detections.

    Equal scores of a class rank by image, then by appearance. A subset holds, of each image and
    class, the best ones: what they match does not depend on the others, so that all subsets share
    the work.

    Args:
        subsets: bool ``(N,)`` each.

    Returns:
        Of each subset its results, NaN where no class has an object that a metric is about; and
        the precision ``(T, R, K)`` of objects of all sizes, NaN for classes without.
    """
    # In this order those of a class are together, best first.
    ranked = np.lexsort((detections.image, -detections.scores, detections.category))
    ranked = ranked[_accountable(truth, detections)[ranked]]
    detections = detections[ranked]
    pairs = truth.pair(detections.image, detections.category)
    # An unmatched one is an error only where all objects, of its size too, are annotated.
    excused = np.isin(pairs, truth.not_exhaustive) | _outside(_box_area(detections.boxes))  # (A, N)
    ignored = truth.ignore | _outside(truth.area)  # (A, G)
    matches = _match(truth, detections, ignored)

    results = []
    of_all_sizes = list(AREA_RANGES).index("all")
    for subset in subsets:
        precision, recall = _all_curves(
            truth, detections, matches, excused, ignored, subset[ranked]
        )
        of_classes = np.moveaxis(precision[:, of_all_sizes], 0, -1).copy()
        results.append((_summary(truth, precision, recall), of_classes))
    return results


def _all_curves(
    truth: LVISGroundTruth,
    detections: LVISDetections,
    matches: _Matches,
    excused: np.ndarray,
    ignored: np.ndarray,
    subset: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision ``(K, A, T, R)`` and recall ``(K, A, T)`` of K classes, NaN where undefined."""
    num_classes = len(truth.category_ids)
    shape = (num_classes, len(AREA_RANGES), len(IOU_THRESHOLDS))
    precision, recall = np.full((*shape, len(RECALL_LEVELS)), np.nan), np.full(shape, np.nan)
    counts = np.stack([np.bincount(truth.category[~i], minlength=num_classes) for i in ignored])
    rows = np.flatnonzero(subset)
    rows = np.split(rows, np.searchsorted(detections.category[rows], np.arange(1, num_classes)))
    for category in np.flatnonzero(counts.any(axis=0)).tolist():
        matched, void = matches.of(rows[category])
        hits = matched & ~void
        errors = ~matched & ~excused[:, None, rows[category]]
        for area in np.flatnonzero(counts[:, category]).tolist():
            precision[category, area], recall[category, area] = _curves(
                hits[area], errors[area], int(counts[area, category])
            )
    return precision, recall


def _accountable(truth: LVISGroundTruth, detections: LVISDetections) -> np.ndarray:
    """Which have an area, and a class that is known to be, or not to be, in their image."""
    pairs = truth.pair(detections.image, detections.category)
    known = np.union1d(truth.negative, truth.pair(truth.image, truth.category))
    return np.isin(pairs, known) & has_area(_box_area(detections.boxes))


def _box_area(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, 2].astype(np.float64) * boxes[:, 3].astype(np.float64)


def _outside(area: np.ndarray) -> np.ndarray:
    """bool ``(A, n)``: which areas ``(n,)`` are outside of each range."""
    low, high = np.asarray(list(AREA_RANGES.values())).T[..., None]
    return (area < low) | (area > high)


def _curves(hits: np.ndarray, errors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision ``(T, R)`` and final recall ``(T,)`` of a class with ``count`` objects.

    Args:
        hits, errors: bool ``(T, D)``, best detection first.
    """
    hits = np.cumsum(hits, axis=-1, dtype=np.float64)
    errors = np.cumsum(errors, axis=-1, dtype=np.float64)
    purity = hits / (errors + hits + np.spacing(1))
    # The precision at a recall is the best one at that recall or beyond; 0 where none gets there.
    best = np.zeros((len(hits), hits.shape[1] + 1))
    best[:, :-1] = np.maximum.accumulate(purity[:, ::-1], axis=-1)[:, ::-1]
    recall = hits / count
    reached = np.stack([np.searchsorted(curve, RECALL_LEVELS) for curve in recall])
    return np.take_along_axis(best, reached, axis=-1), recall.max(axis=-1, initial=0.0)


def _match(truth: LVISGroundTruth, detections: LVISDetections, ignored: np.ndarray) -> _Matches:
    """Match detections, best first, with objects of their image and class.

    Each takes, of the objects still free that it overlaps enough, the one it overlaps most; of
    equals the later; an ignored one only if there is no other.

    Args:
        ignored: bool ``(A, G)``, objects that do not count.
    """
    rows, objects, ious = _near_pairs(truth, detections)
    order = np.lexsort((-objects, -ious, rows))
    rows, objects, ious = rows[order], objects[order], ious[order]
    near, starts, counts = np.unique(rows, return_index=True, return_counts=True)
    slot = np.full(len(detections), -1)
    slot[near] = np.arange(len(near))

    free = np.ones((len(ignored), len(IOU_THRESHOLDS), ignored.shape[1]), dtype=bool)
    matched = np.zeros((*free.shape[:2], len(near)), dtype=bool)
    void = np.zeros_like(matched)
    areas = np.arange(len(ignored))[:, None, None]
    for turn in _turns(truth.pair(detections.image[near], detections.category[near])):
        # d detections, each of another image or class, with up to c objects, preferred ones first.
        offsets = np.arange(counts[turn].max())
        pairs = np.minimum(starts[turn, None] + offsets, len(rows) - 1)
        candidates = objects[pairs]  # (d, c)
        overlaps = (ious[pairs] >= IOU_THRESHOLDS[:, None, None]) & (offsets < counts[turn, None])
        possible = free[..., candidates] & overlaps  # (A, T, d, c)
        better = possible & ~ignored[:, None, candidates]
        possible = np.where(better.any(axis=-1, keepdims=True), better, possible)
        found = possible.any(axis=-1)  # (A, T, d)
        best = candidates[np.arange(len(turn)), possible.argmax(axis=-1)]
        area, threshold, _ = found.nonzero()
        free[area, threshold, best[found]] = False
        matched[..., turn] = found
        void[..., turn] = found & ignored[areas, best]
    return _Matches(slot, matched, void)


def _near_pairs(
    truth: LVISGroundTruth, detections: LVISDetections
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P pairs of a detection and an object of its image and class that it overlaps enough; IoU."""
    boxes = detections.boxes.astype(np.float64)
    rows, objects = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    overlaps = [np.zeros(0)]
    pairs = truth.pair(detections.image, detections.category)
    for these, those in _common_groups(pairs, truth.pair(truth.image, truth.category)):
        ious = mask.iou(boxes[these], truth.boxes[those], np.zeros(len(those), np.uint8))
        row, column = np.nonzero(ious >= IOU_THRESHOLDS[0])
        rows.append(these[row])
        objects.append(those[column])
        overlaps.append(ious[row, column])
    return np.concatenate(rows), np.concatenate(objects), np.concatenate(overlaps)


def _common_groups(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each value in both arrays, where it is in the one and where in the other, ascending."""
    values = np.intersect1d(a, b)
    groups = []
    for array in (a, b):
        order = np.argsort(array, kind="stable")
        ordered = array[order]
        starts = np.searchsorted(ordered, values).tolist()
        ends = np.searchsorted(ordered, values, side="right").tolist()
        groups.append([order[start:end] for start, end in zip(starts, ends)])
    return zip(*groups)


def _turns(groups: np.ndarray) -> Iterator[np.ndarray]:
    """The first row of each group, then the second of each that has one, and so on."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
    by_rank = np.argsort(ranks, kind="stable")
    for turn in np.split(by_rank, np.cumsum(np.bincount(ranks))[:-1]):
        for start in range(0, len(turn), _BLOCK):
            yield turn[start : start + _BLOCK]


def _summary(truth: LVISGroundTruth, precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    areas = list(AREA_RANGES)
    results: dict[str, float] = OrderedDict()
    for name, (iou, area, frequency) in _PRECISIONS.items():
        classes = [frequency in (None, found) for found in truth.frequencies]
        thresholds = slice(None) if iou is None else np.isclose(IOU_THRESHOLDS, iou)
        results[name] = _mean(
            precision[np.asarray(classes, bool), areas.index(area)][:, thresholds]
        )
    for name, area in _RECALLS.items():
        results[name] = _mean(recall[:, areas.index(area)])
    return results


def _mean(values: np.ndarray) -> float:
    """Mean of what is defined; NaN where nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
