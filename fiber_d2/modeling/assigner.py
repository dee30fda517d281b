"""Adaptive training sample selection (ATSS, arXiv:1912.02424).

The model specification, section 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .boxes import box_centers, pairwise_iou_inclusive

# An anchor's centre must be this far inside a box, in pixels.
MIN_INSIDE = 0.01


class ATSSAssigner:
    """Decides which anchors of which images answer for which boxes.

    Args:
        topk: anchors per level nearest to a box's centre that are candidates.
    """

    def __init__(self, topk: int = 9) -> None:
        self.topk = topk

    @torch.no_grad()
    def __call__(
        self, anchors_per_level: Sequence[torch.Tensor], boxes: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Assign every image of a batch at once.

        Args:
            anchors_per_level: ``(A_l, 4)`` per level.
            boxes: ``(B, M, 4)``, images with fewer boxes padded.
            valid: bool ``(B, M)``, False for padding.

        Returns:
            int64 ``(B, A)``: index of the assigned box of the image, -1 for none.
        """
        anchors = torch.cat(list(anchors_per_level))
        batch, num_boxes = boxes.shape[:2]
        if num_boxes == 0:
            return torch.full((batch, len(anchors)), -1, device=boxes.device)
        centers = box_centers(anchors)  # (A, 2)
        delta = box_centers(boxes)[:, :, None] - centers  # (B, M, A, 2)
        distance = delta.pow(2).sum(dim=-1).sqrt()
        candidates = []
        start = 0
        for level in anchors_per_level:
            near = distance[..., start : start + len(level)]
            nearest = near.topk(min(self.topk, len(level)), dim=-1, largest=False).indices
            candidates.append(nearest + start)
            start += len(level)
        candidate = torch.cat(candidates, dim=-1)  # (B, M, levels * topk)

        iou = pairwise_iou_inclusive(boxes, anchors)  # (B, M, A)
        candidate_iou = iou.gather(-1, candidate)
        threshold = candidate_iou.mean(dim=-1) + candidate_iou.std(dim=-1)
        candidate_center = centers[candidate]  # (B, M, candidates, 2)
        inside = torch.cat(
            [candidate_center - boxes[:, :, None, :2], boxes[:, :, None, 2:] - candidate_center],
            dim=-1,
        ).amin(dim=-1)
        positive = (
            (candidate_iou >= threshold[..., None]) & (inside > MIN_INSIDE) & valid[..., None]
        )
        # An anchor claimed by several boxes goes to the one it overlaps most, then to the first.
        claims = torch.full_like(iou, -torch.inf)
        claims.scatter_(-1, candidate, candidate_iou.masked_fill(~positive, -torch.inf))
        best, assigned = claims.max(dim=1)
        return assigned.masked_fill(best == -torch.inf, -1)
