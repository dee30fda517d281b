"""From what an exported detector returns to boxes with scores.

This file needs numpy alone: copy it to where neither torch nor this package is. The steps and their
order are those of :class:`fiber_d2.modeling.PostProcessor`: candidates of each level, suppression
within a class, limits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def level_sizes(
    height: int, width: int, strides: Sequence[int] = (8, 16, 32, 64, 128)
) -> list[int]:
    """Anchors of each level, in the order of ``boxes``.

    Args:
        height, width: of the padded image, multiples of 32.
    """
    return [-(-height // stride) * -(-width // stride) for stride in strides]


def detections(
    boxes: np.ndarray,
    class_scores: np.ndarray,
    centerness: np.ndarray,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    score_thresh: float = 0.05,
    pre_nms_topk: int = 1000,
    nms_thresh: float = 0.6,
    max_detections: int = 100,
    strides: Sequence[int] = (8, 16, 32, 64, 128),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections of one image and caption.

    Args:
        boxes: ``(A, 4)``.
        class_scores: ``(A, K)``.
        centerness: ``(A,)``.
        padded_size: (height, width) of the image that the detector was given.
        image_size: (height, width) without the padding.
        score_thresh: a candidate's class score must exceed it, before centerness enters.
        pre_nms_topk: candidates kept per level.
        nms_thresh: overlap above which a box of the same class is suppressed.
        max_detections: at most; ties with the last one are kept.
        strides: of the levels.

    Returns:
        boxes ``(N, 4)`` XYXY in pixels of the image, scores ``(N,)`` and classes int64 ``(N,)``
        (row of the positive map), by descending score.

    Raises:
        ValueError: ``boxes`` are not those of an image of that padded size.
    """
    sizes = level_sizes(*padded_size, strides)
    if sum(sizes) != len(boxes):
        raise ValueError(
            f"An image padded to {padded_size[0]}x{padded_size[1]} pixels has {sum(sizes)} "
            f"anchors, but there are {len(boxes)} boxes: padded_size is that of the image that "
            "the detector was given."
        )
    targets = class_scores.shape[1]
    ranking = np.where(class_scores > score_thresh, class_scores * centerness[:, None], -1.0)
    chosen = []
    for start, size in zip(np.cumsum([0, *sizes]), sizes):
        level = ranking[start : start + size].ravel()
        best = np.argsort(-level, kind="stable")[:pre_nms_topk]
        chosen.append(start * targets + best[level[best] >= 0])
    index = np.concatenate(chosen)
    scores = np.sqrt(ranking.ravel()[index])
    classes = index % targets
    height, width = image_size
    limit = np.array([width - 1, height - 1] * 2, dtype=boxes.dtype)
    found = np.minimum(np.maximum(boxes[index // targets], 0), limit)
    keep = _suppress(found, scores, classes, nms_thresh)
    if len(keep) > max_detections:
        keep = keep[scores[keep] >= scores[keep[max_detections - 1]]]
    return found[keep], scores[keep], classes[keep]


def _suppress(
    boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, threshold: float
) -> np.ndarray:
    """Indices of the boxes that no better one of their class overlaps by more than ``threshold``.

    A box covers ``x2 - x1 + 1`` pixels.
    """
    order = np.argsort(-scores, kind="stable")
    low = boxes[order, :2].astype(np.float64)
    high = boxes[order, 2:].astype(np.float64) + 1
    area = (high - low).prod(axis=1)
    classes = classes[order]
    left = np.ones(len(order), dtype=bool)
    for one in range(len(order)):
        if not left[one]:
            continue
        rest = one + 1 + np.flatnonzero(left[one + 1 :] & (classes[one + 1 :] == classes[one]))
        sides = np.minimum(high[one], high[rest]) - np.maximum(low[one], low[rest])
        shared = sides.clip(min=0).prod(axis=1)
        left[rest[shared > threshold * (area[one] + area[rest] - shared)]] = False
    return order[left]
