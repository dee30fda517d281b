"""One set of detections from those of several views of an image.

Per class: greedy suppression, soft suppression (arXiv:1704.04503) or box voting, in which boxes
that overlap are averaged. Every function works in float64 and returns the type it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torchvision.ops import box_iou, nms

Detections = tuple[torch.Tensor, torch.Tensor]  # boxes (N, 4) and scores (N,)

METHODS = ("nms", "soft-nms", "vote", "soft-vote")
# Corner (x2, y2) of the original is part of the box; one further it is where the box ends.
_INCLUSIVE = (0.0, 0.0, 1.0, 1.0)
# Entries of one overlap matrix; bounds the memory of voting.
_MAX_ENTRIES = 2**24


def merge_detections(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    *,
    method: str = "nms",
    threshold: float = 0.6,
    max_detections: int = 1000,
    soft_vote_min_score: float = 0.05,
    soft_nms_min_score: float = 0.001,
    soft_nms_sigma: float | None = None,
    legacy: bool = True,
    by_score: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge overlapping boxes of the same class.

    Args:
        boxes: ``(N, 4)`` XYXY.
        scores: ``(N,)``, not negative.
        classes: int64 ``(N,)``, any numbers.
        method:
            ``"nms"`` drops a box whose overlap with a better kept one exceeds ``threshold``;
            ``"soft-nms"`` lowers its score instead, by the overlap;
            ``"vote"`` joins the best box and all that overlap it by ``threshold`` or more: their
            mean, weighted by score, gets the best score; then the same with the rest;
            ``"soft-vote"`` also keeps each joined box with the score times (1 - overlap).
        threshold: IoU in (0, 1].
        max_detections: of all classes, by score; those as good as the last one stay, too. 0 for
            no limit.
        soft_vote_min_score: joined boxes whose lowered score is less are dropped.
        soft_nms_min_score: boxes whose score is, or becomes, less are dropped.
        soft_nms_sigma: None lowers by ``1 - overlap`` where that exceeds ``threshold``; a number
            by ``exp(-overlap**2 / sigma)`` everywhere.
        legacy: widths and heights count ``x2 - x1 + 1`` as in the original; False for plain boxes.
        by_score: order of the result: by descending score, else by class and in it by
            descending score.

    Returns:
        boxes ``(M, 4)``, scores ``(M,)`` and classes ``(M,)``.

    Raises:
        ValueError: an unknown method, or a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold!r}; an overlap in (0, 1] is needed.")
    if method == "nms":
        merge_class = partial(_suppress, threshold=threshold)
    elif method == "soft-nms":
        merge_class = partial(
            _suppress_softly,
            threshold=threshold,
            min_score=soft_nms_min_score,
            sigma=soft_nms_sigma,
        )
    elif method == "vote":
        merge_class = partial(_vote, threshold=threshold)
    elif method == "soft-vote":
        merge_class = partial(_vote, threshold=threshold, min_score=soft_vote_min_score)
    else:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")

    shift = boxes.new_tensor(_INCLUSIVE if legacy else (0.0,) * 4, dtype=torch.float64)
    ends, values = boxes.double() + shift, scores.double()
    order = classes.argsort(stable=True)
    present, counts = classes[order].unique_consecutive(return_counts=True)
    merged = [(ends[:0], values[:0])]
    # One class at a time: a suppression of all of them would need N*N bits on a GPU.
    for rows in order.split(counts.tolist()):
        merged.append(merge_class(ends[rows], values[rows]))
    sizes = torch.tensor([len(found) for _, found in merged[1:]], device=classes.device).long()
    boxes = (torch.cat([found for found, _ in merged]) - shift).to(boxes.dtype)
    scores = torch.cat([found for _, found in merged]).to(scores.dtype)
    classes = present.repeat_interleave(sizes)

    keep = torch.arange(len(scores), device=scores.device)
    if 0 < max_detections < len(scores):
        keep = keep[scores >= scores.topk(max_detections).values[-1]]
    if by_score:
        keep = keep[scores[keep].argsort(descending=True, stable=True)]
    return boxes[keep], scores[keep], classes[keep]


def in_size_range(
    boxes: torch.Tensor, size_range: Sequence[float], *, legacy: bool = True
) -> torch.Tensor:
    """Which boxes are larger than the least size and smaller than the greatest.

    Args:
        boxes: ``(N, 4)`` XYXY.
        size_range: least and greatest size, the square root of an area; neither is included.
        legacy: as of :func:`merge_detections`.

    Returns:
        bool ``(N,)``.
    """
    smallest, greatest = size_range
    area = (boxes[:, 2:] - boxes[:, :2] + int(legacy)).prod(dim=1)
    return (area > smallest**2) & (area < greatest**2)


def _suppress(boxes: torch.Tensor, scores: torch.Tensor, *, threshold: float) -> Detections:
    keep = nms(boxes, scores, threshold)
    return boxes[keep], scores[keep]


def _suppress_softly(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    *,
    threshold: float,
    min_score: float,
    sigma: float | None,
) -> Detections:
    device = boxes.device
    # Many small steps that wait for each other: on a GPU each would cost a round trip.
    boxes, scores = boxes.cpu(), scores.cpu()
    kept_boxes, kept_scores = [boxes[:0]], [scores[:0]]
    while True:
        alive = scores >= min_score
        boxes, scores = boxes[alive], scores[alive]
        if not len(scores):
            break
        best = int(scores.argmax())
        kept_boxes.append(boxes[best : best + 1])
        kept_scores.append(scores[best : best + 1])
        overlap = box_iou(kept_boxes[-1], boxes)[0]
        if sigma is None:
            factor = torch.where(overlap > threshold, 1 - overlap, 1.0)
        else:
            factor = (-(overlap**2) / sigma).exp()
        scores = scores * factor
        scores[best] = -1.0  # below any min_score
    return torch.cat(kept_boxes).to(device), torch.cat(kept_scores).to(device)


def _vote(
    boxes: torch.Tensor, scores: torch.Tensor, *, threshold: float, min_score: float | None = None
) -> Detections:
    """Means of groups of boxes; with ``min_score`` the members, too, with lowered scores.

    Taking the best box with all that overlap it, then the best of the rest, gives groups around
    the boxes that suppression keeps; others are in the group of the best one they overlap.
    """
    # Suppression is for overlaps beyond a threshold, groups begin at it. torchvision compares
    # with a float32 on GPUs, so the number just below must be one.
    below = float(np.nextafter(np.float32(threshold), np.float32(0)))
    heads = nms(boxes, scores, below)
    group, overlap = [], []
    for some in boxes.split(max(1, _MAX_ENTRIES // len(heads))):
        overlaps = box_iou(boxes[heads], some)  # (heads, some)
        # The first of several maxima, here of ones.
        group.append((overlaps > below).byte().argmax(dim=0))
        overlap.append(overlaps.gather(0, group[-1][None])[0])
    group, overlap = torch.cat(group), torch.cat(overlap)
    # Said apart for boxes without an area, which do not overlap themselves.
    group[heads] = torch.arange(len(heads), device=heads.device)
    weights = scores.clamp(min=torch.finfo(scores.dtype).tiny)
    total = weights.new_zeros(len(heads)).index_add(0, group, weights)
    sums = boxes.new_zeros(len(heads), 4).index_add(0, group, boxes * weights[:, None])
    means, best = sums / total[:, None], scores[heads]
    if min_score is None:
        return means, best
    lowered = scores * (1 - overlap)
    stays = lowered >= min_score
    means, best = torch.cat([means, boxes[stays]]), torch.cat([best, lowered[stays]])
    order = best.argsort(descending=True, stable=True)
    return means[order], best[order]
