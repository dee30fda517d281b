"""Anchors, box coding and overlaps: the original's inclusive-corner ("+1") arithmetic in one place.

The model specification, section 6.

Boxes are float32 XYXY in pixels of the padded batch. A box covers ``x2 - x1 + 1`` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

# The weights of (dx, dy, dw, dh) in the regression targets.
CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# Largest log ratio of a decoded side to its anchor's.
MAX_LOG_RATIO = math.log(1000.0 / 16)


class AnchorGrid(nn.Module):
    """One square anchor per location of every level.

    Args:
        strides: pixels between the anchors of a level.
        sizes: side of the anchors of a level in pixels, counted inclusively.
    """

    def __init__(
        self,
        *,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        sizes: Sequence[float] = (64, 128, 256, 512, 1024),
    ) -> None:
        super().__init__()
        if len(strides) != len(sizes):
            raise ValueError(
                f"Anchors need one size per stride, got sizes {tuple(sizes)} for strides "
                f"{tuple(strides)}."
            )
        self.strides = tuple(strides)
        self.sizes = tuple(sizes)

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For maps ``(P, C, H_l, W_l)``: anchors ``(H_l*W_l, 4)`` per level, row by row.

        Raises:
            ValueError: not as many maps as strides.
        """
        if len(levels) != len(self.strides):
            raise ValueError(
                f"The pyramid has {len(levels)} levels, but there are {len(self.strides)} anchor "
                "strides: give the anchors one stride and one size for each level."
            )
        anchors = []
        for level, stride, size in zip(levels, self.strides, self.sizes):
            height, width = level.shape[-2:]
            device = level.device
            y = torch.arange(height, device=device) * stride + (stride - 1) / 2
            x = torch.arange(width, device=device) * stride + (stride - 1) / 2
            center = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)  # (H*W, 2)
            half = (size - 1) / 2
            anchors.append(torch.cat([center - half, center + half], dim=-1).float())
        return anchors


def box_centers(boxes: torch.Tensor) -> torch.Tensor:
    """``(..., 4)`` to ``(..., 2)`` x and y."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def encode_boxes(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes to regression targets ``(..., 4)``, the inverse of :func:`decode_boxes`.

    Args:
        boxes, anchors: ``(..., 4)``.
    """
    size = anchors[..., 2:] - anchors[..., :2] + 1
    shift = (box_centers(boxes) - box_centers(anchors)) / size
    log_ratio = ((boxes[..., 2:] - boxes[..., :2] + 1) / size).log()
    return torch.cat([shift, log_ratio], dim=-1) * boxes.new_tensor(CODE_WEIGHTS)


def decode_boxes(deltas: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Regression output to boxes.

    Args:
        deltas: ``(..., 4)`` dx, dy, dw, dh.
        anchors: ``(..., 4)``, broadcast against ``deltas``.
    """
    weights = deltas.new_tensor(CODE_WEIGHTS)
    shift, log_ratio = (deltas / weights).split(2, dim=-1)
    size = anchors[..., 2:] - anchors[..., :2] + 1
    center = box_centers(anchors) + shift * size
    half = 0.5 * (size * log_ratio.clamp(max=MAX_LOG_RATIO).exp() - 1)
    return torch.cat([center - half, center + half], dim=-1)


def pairwise_iou_inclusive(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """``(..., N, 4)`` and ``(M, 4)`` to overlaps ``(..., N, M)``, inclusive corners."""
    area1 = (boxes1[..., 2:] - boxes1[..., :2] + 1).prod(dim=-1)
    area2 = (boxes2[..., 2:] - boxes2[..., :2] + 1).prod(dim=-1)
    low = torch.maximum(boxes1[..., :, None, :2], boxes2[:, :2])
    high = torch.minimum(boxes1[..., :, None, 2:], boxes2[:, 2:])
    overlap = (high - low + 1).clamp(min=0).prod(dim=-1)
    return overlap / (area1[..., :, None] + area2 - overlap)


def generalized_iou(
    boxes: torch.Tensor, targets: torch.Tensor, *, eps: float = 1e-7
) -> torch.Tensor:
    """Row-wise generalised IoU (arXiv:1902.09630) of ``(..., 4)`` boxes, plain corners.

    ``x2`` and ``y2`` of ``boxes`` are first raised to at least ``x1`` and ``y1``.
    """
    low, high = boxes[..., :2], torch.maximum(boxes[..., 2:], boxes[..., :2])
    target_low, target_high = targets[..., :2], targets[..., 2:]
    overlap = (
        (torch.minimum(high, target_high) - torch.maximum(low, target_low)).clamp(min=0).prod(-1)
    )
    union = (high - low).prod(-1) + (target_high - target_low).prod(-1) - overlap
    enclosing = (torch.maximum(high, target_high) - torch.minimum(low, target_low)).prod(-1) + eps
    return overlap / (union + eps) - (enclosing - union) / enclosing


def centerness_targets(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Centerness (FCOS, arXiv:1904.01355) of anchor centres within boxes.

    Args:
        boxes: ``(..., 4)`` assigned ground truth.
        anchors: ``(..., 4)``, broadcast against ``boxes``; centres outside a box give 0.
    """
    center = box_centers(anchors)
    sides = torch.stack([center - boxes[..., :2], boxes[..., 2:] - center], dim=-1)
    sides = sides.clamp(min=0)  # (..., 2 axes, 2 sides)
    ratio = sides.amin(dim=-1) / sides.amax(dim=-1).clamp(min=1e-12)
    return ratio.prod(dim=-1).sqrt()
