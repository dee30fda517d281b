"""Token, box and centerness losses of a batch, without a loop over images and without sync.

The model specification, section 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import nn

from fiber_d2.layers import assigned_token_focal_loss

from .assigner import ATSSAssigner
from .boxes import centerness_targets, decode_boxes, generalized_iou
from .metrics import record_metric


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Mean of a detached tensor over all processes."""
    if comm.get_world_size() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / comm.get_world_size()


class GroundingLoss(nn.Module):
    """Losses of anchors against boxes tied to words.

    Args:
        focal_alpha, focal_gamma: of the token loss.
        box_weight: factor of the box loss.
        atss_topk: see :class:`ATSSAssigner`.
        no_object_column: token column that negative anchors are taught to claim, present only in
            captions that fill the text tower's full width (its last column there).
    """

    def __init__(
        self,
        *,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        box_weight: float = 2.0,
        atss_topk: int = 9,
        no_object_column: int = 255,
    ) -> None:
        super().__init__()
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.box_weight = box_weight
        self.no_object_column = no_object_column
        self.assigner = ATSSAssigner(atss_topk)

    def forward(
        self,
        anchors_per_level: Sequence[torch.Tensor],
        token_logits: torch.Tensor,
        box_deltas: torch.Tensor,
        centerness: torch.Tensor,
        text_mask: torch.Tensor,
        boxes: torch.Tensor,
        valid: torch.Tensor,
        positive_map: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Letters: B images, A anchors, T tokens, M boxes of the fullest image.

        Args:
            anchors_per_level: ``(A_l, 4)`` per level.
            token_logits: ``(B, A, T)``.
            box_deltas: ``(B, A, 4)``.
            centerness: logits ``(B, A)``.
            text_mask: bool ``(B, T)``.
            boxes: ground truth ``(B, M, 4)`` in pixels of the batch, padded.
            valid: bool ``(B, M)``.
            positive_map: ``(B, M, T)``, tokens of each box: bool, as training feeds it, or float
                weights in 0..1.

        Returns:
            ``loss_token``, ``loss_box``, ``loss_centerness``; float32 scalars, summed over the
            batch and divided by the positives' share of all processes. The anchors of an image
            that boxes were assigned to, on average, are recorded as ``positives_per_image``.
        """
        assigned = self.assigner(anchors_per_level, boxes, valid)  # (B, A)
        positive = assigned >= 0
        token_loss = assigned_token_focal_loss(
            token_logits,
            assigned,
            positive_map,
            text_mask,
            no_object_column=self.no_object_column,
            alpha=self.focal_alpha,
            gamma=self.focal_gamma,
        )

        anchors = torch.cat(list(anchors_per_level))
        batch = len(boxes)
        if boxes.shape[1] == 0:
            # One all-zero box that nothing is assigned to keeps the shapes regular.
            boxes = boxes.new_zeros(batch, 1, 4)
        row = assigned.clamp(min=0)
        target_box = boxes.gather(1, row[..., None].expand(-1, -1, 4))  # (B, A, 4)
        weight = centerness_targets(target_box, anchors) * positive
        overlap = generalized_iou(decode_boxes(box_deltas.float(), anchors), target_box)
        box_loss = ((1 - overlap) * weight).sum()
        centerness_loss = F.binary_cross_entropy_with_logits(
            centerness.float(), weight, weight=positive.float(), reduction="sum"
        )

        shares = torch.stack([positive.sum().to(weight.dtype), weight.sum()])
        record_metric("positives_per_image", shares[0] / batch)
        num_positive, total_weight = mean_over_processes(shares)
        num_positive = num_positive.clamp(min=1)
        return {
            "loss_token": token_loss / num_positive,
            "loss_box": self.box_weight * box_loss / total_weight.clamp(min=1e-6),
            "loss_centerness": centerness_loss / num_positive,
        }
