"""Anchors, box coding and overlaps: the original's inclusive-corner ("+1") arithmetic in one place.

The model specification, section 6.

Boxes are float32 XYXY in pixels of the padded batch. A box covers ``x2 - x1 + 1`` pixels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

# The weights of dx and dy, and of dw and dh, in the regression targets. Factors, not tensors: to
# make one on a GPU, the host would have to wait for it.
SHIFT_WEIGHT, SIZE_WEIGHT = 10.0, 5.0
# Largest log ratio of a decoded side to its anchor's.
MAX_LOG_RATIO = math.log(1000.0 / 16)
# Sets of map sizes whose anchors are kept, 0.3 MB each at 800 x 1216 pixels.
KEPT_GRIDS = 16


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
        # By device and map sizes, the one used last at the end; no part of the state dict.
        self._kept: OrderedDict[object, list[torch.Tensor]] = OrderedDict()

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For maps ``(P, C, H_l, W_l)``: anchors ``(H_l*W_l, 4)`` per level, row by row.

        Those of the last sizes are kept and handed out again: they are not to be written to.

        Raises:
            ValueError: not as many maps as strides.
        """
        if len(levels) != len(self.strides):
            raise ValueError(
                f"The pyramid has {len(levels)} levels, but there are {len(self.strides)} anchor "
                "strides: give the anchors one stride and one size for each level."
            )
        # What is traced has to compute its anchors, and may not leave stand-ins of tensors here.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_stand_in(levels[0]):
            return self._compute(levels)
        key = (levels[0].device, *(tuple(level.shape[-2:]) for level in levels))
        anchors = self._kept.pop(key, None)
        if anchors is None:
            # Tensors made in inference mode could never be trained with.
            with torch.inference_mode(False):
                anchors = self._compute(levels)
            while len(self._kept) >= KEPT_GRIDS:
                self._kept.popitem(last=False)
        self._kept[key] = anchors
        return list(anchors)

    def __getstate__(self) -> dict[str, object]:
        """Copies start without anchors."""
        return {**self.__dict__, "_kept": OrderedDict()}

    def _compute(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        anchors = []
        for level, stride, size in zip(levels, self.strides, self.sizes):
            height, width = level.shape[-2:]
            device = level.device
            y = torch.arange(height, device=device) * stride + (stride - 1) / 2
            x = torch.arange(width, device=device) * stride + (stride - 1) / 2
            y, x = torch.meshgrid(y, x, indexing="ij")
            center = torch.stack([x, y], dim=-1).flatten(0, 1)  # (H*W, 2)
            half = (size - 1) / 2
            anchors.append(torch.cat([center - half, center + half], dim=-1).float())
        return anchors


def _is_stand_in(tensor: torch.Tensor) -> bool:
    """Whether it has a shape but no numbers, as while a program is exported."""
    return tensor.device.type == "meta" or type(tensor) not in (torch.Tensor, nn.Parameter)


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
    return torch.cat([shift * SHIFT_WEIGHT, log_ratio * SIZE_WEIGHT], dim=-1)


def decode_boxes(deltas: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Regression output to boxes.

    Args:
        deltas: ``(..., 4)`` dx, dy, dw, dh.
        anchors: ``(..., 4)``, broadcast against ``deltas``.
    """
    shift, log_ratio = deltas.split(2, dim=-1)
    size = anchors[..., 2:] - anchors[..., :2] + 1
    center = box_centers(anchors) + shift / SHIFT_WEIGHT * size
    half = 0.5 * (size * (log_ratio / SIZE_WEIGHT).clamp(max=MAX_LOG_RATIO).exp() - 1)
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
