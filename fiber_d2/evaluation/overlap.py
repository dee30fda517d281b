"""At which rank does a ranked list of boxes first meet its target? Ragged lists, no Python loops.

Boxes are continuous XYXY: the width is ``x2 - x1``, without the legacy "+1".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Larger than any rank, so that ``rank < k`` is False for every k.
NEVER = np.iinfo(np.int64).max


def box_overlap(first: np.ndarray, second: np.ndarray, *, generalized: bool = False) -> np.ndarray:
    """IoU (or GIoU) of row ``i`` of ``first`` with row ``i`` of ``second``.

    Args:
        first, second: ``(N, 4)`` XYXY.
        generalized: GIoU: IoU less the share of the enclosing box that neither box covers.

    Returns:
        ``(N,)`` in the inputs' floating type; 0 where both boxes are without area (not 0/0).
    """
    sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    intersection = np.prod(np.clip(sides, 0, None), axis=1)
    areas = np.prod(first[:, 2:] - first[:, :2], axis=1)
    union = areas + np.prod(second[:, 2:] - second[:, :2], axis=1) - intersection
    overlap = _ratio(intersection, union)
    if generalized:
        span = np.maximum(first[:, 2:], second[:, 2:]) - np.minimum(first[:, :2], second[:, :2])
        enclosing = np.prod(span, axis=1)
        overlap -= _ratio(enclosing - union, enclosing)
    return overlap


def first_hit_ranks(
    predictions: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    *,
    threshold: float,
    generalized: bool = False,
    dtype: type[np.floating] = np.float64,
) -> np.ndarray:
    """Rank (from 0) of the first box of each list that overlaps any target of that list.

    Args:
        predictions: N arrays ``(p_i, 4)``, XYXY, best first.
        targets: N arrays ``(g_i, 4)``, XYXY.
        threshold: a hit has overlap >= threshold (inclusive), 0 < threshold <= 1.
        generalized: measure by GIoU.
        dtype: precision of the arithmetic; it decides on which side of the threshold a borderline
            case falls.

    Returns:
        int64 ``(N,)``; ``NEVER`` where no box hits. The share of lists hit at ``k`` is
        ``(ranks < k).mean()``, and at any rank ``(ranks < NEVER).mean()``.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"iou_thresh must be above 0 and at most 1, got {threshold}.")
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} lists of boxes for {len(targets)} targets.")
    ranks = np.full(len(targets), NEVER, dtype=np.int64)
    boxes, box_owner, box_rank, _ = _flatten(predictions, dtype)
    truth, _, _, truth_counts = _flatten(targets, dtype)
    truth_start = np.cumsum(truth_counts) - truth_counts
    # One row per (predicted box, target box) pair of the same list.
    pairs_per_box = truth_counts[box_owner]
    pair_box = np.repeat(np.arange(len(boxes)), pairs_per_box)
    pair_owner = box_owner[pair_box]
    pair_truth = truth_start[pair_owner] + _positions(pairs_per_box)
    overlap = box_overlap(boxes[pair_box], truth[pair_truth], generalized=generalized)
    hit = overlap >= threshold
    np.minimum.at(ranks, pair_owner[hit], box_rank[pair_box[hit]])
    return ranks


def _flatten(
    groups: Sequence[np.ndarray], dtype: type[np.floating]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of all groups ``(M, 4)``, group and place in it ``(M,)``, group sizes ``(N,)``."""
    arrays = [np.asarray(group, dtype=dtype).reshape(-1, 4) for group in groups]
    counts = np.asarray([len(array) for array in arrays], dtype=np.int64)
    boxes = np.concatenate([np.zeros((0, 4), dtype), *arrays])
    return boxes, np.repeat(np.arange(len(arrays)), counts), _positions(counts), counts


def _positions(counts: np.ndarray) -> np.ndarray:
    """0..c-1 for every count c, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
