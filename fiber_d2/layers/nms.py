"""Class-wise non-maximum suppression."""

from __future__ import annotations

import torch
from torchvision.ops import nms


def class_aware_nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    iou_threshold: float,
    *,
    legacy: bool = True,
) -> torch.Tensor:
    """Greedy suppression within each class; a box goes where its IoU exceeds the threshold.

    Args:
        boxes: ``(N, 4)`` XYXY.
        scores: ``(N,)``.
        classes: int64 ``(N,)``.
        legacy: widths and heights count ``x2 - x1 + 1`` as in the original; False for plain boxes.

    Returns:
        int64 indices of the kept boxes, by descending score.
    """
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    # float64 keeps the shifted copies as exact as the float32 originals.
    boxes = boxes.double()
    if legacy:
        # Moving x2 and y2 by one turns plain areas and overlaps into the inclusive ones.
        boxes = boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    # Classes are moved apart so that one call serves all of them.
    span = boxes.max() - boxes.min() + 1
    return nms(boxes + (classes.double() * span)[:, None], scores.double(), iou_threshold)
