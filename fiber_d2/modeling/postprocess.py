"""From head outputs to boxes with scores: aggregation, candidates, suppression, limits.

The model specification, section 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from fiber_d2.layers import class_aware_nms

from .boxes import decode_boxes


def aggregate_token_scores(
    token_scores: torch.Tensor, positive_map: torch.Tensor, how: str = "mean"
) -> torch.Tensor:
    """Target scores from token probabilities.

    Args:
        token_scores: ``(P, A, T)`` in 0..1.
        positive_map: ``(P, K, T)``; rows sum to 1, or are zero for targets without tokens.
        how: ``"mean"`` over the target's tokens, ``"max"``, or ``"power"``, their geometric mean.

    Returns:
        ``(P, A, K)``; 0 for targets without tokens.
    """
    if how == "mean":
        return token_scores @ positive_map.transpose(1, 2)
    if how == "max":
        # One target at a time would be a loop; one (P, A, K, T) tensor would not fit. Tokens
        # belong to few targets, so the maximum is scattered over the (target, token) pairs.
        pair, target, token = positive_map.nonzero(as_tuple=True)
        scores = token_scores.new_zeros(
            token_scores.shape[0], positive_map.shape[1], token_scores.shape[1]
        )
        flat = scores.view(-1, token_scores.shape[1])
        rows = pair * positive_map.shape[1] + target
        values = token_scores[pair, :, token]
        flat.scatter_reduce_(0, rows[:, None].expand_as(values), values, "amax")
        return scores.transpose(1, 2)
    if how == "power":
        smallest = torch.finfo(token_scores.dtype).tiny
        scores = (token_scores.clamp(min=smallest).log() @ positive_map.transpose(1, 2)).exp()
        return scores * (positive_map.sum(dim=-1) > 0)[:, None]
    raise ValueError(f"score_aggregation is {how!r}; it must be 'mean', 'max' or 'power'.")


class PostProcessor(nn.Module):
    """Candidates per level, decoding, class-wise suppression and limits (ATSS order).

    Args:
        score_thresh: a candidate's class score must exceed it, before centerness enters.
        pre_nms_topk: candidates kept per level.
        nms_thresh: overlap above which a box of the same class is suppressed.
        max_detections: per image and prompt; ties with the last one are kept.
        score_aggregation: ``"mean"``, ``"max"`` or ``"power"`` over a target's tokens.
        max_merged_detections: per image after the prompts of an image are merged, 0 for no limit.
    """

    def __init__(
        self,
        *,
        score_thresh: float = 0.05,
        pre_nms_topk: int = 1000,
        nms_thresh: float = 0.6,
        max_detections: int = 100,
        score_aggregation: str = "mean",
        max_merged_detections: int = 0,
    ) -> None:
        super().__init__()
        self.score_thresh = score_thresh
        self.pre_nms_topk = pre_nms_topk
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections
        self.score_aggregation = score_aggregation
        self.max_merged_detections = max_merged_detections

    def forward(
        self,
        anchors_per_level: Sequence[torch.Tensor],
        token_logits: torch.Tensor,
        box_deltas: torch.Tensor,
        centerness: torch.Tensor,
        positive_map: torch.Tensor,
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Detections of every image-prompt pair.

        Args:
            anchors_per_level: ``(A_l, 4)`` per level.
            token_logits: ``(P, A, T)``; padded tokens carry no weight in ``positive_map``.
            box_deltas: ``(P, A, 4)``.
            centerness: logits ``(P, A)``.
            positive_map: ``(P, K, T)``.
            image_sizes: unpadded (height, width) of each pair's image.

        Returns:
            per pair, Instances in pixels of the network input, by descending score;
            ``pred_classes`` is the row of the positive map.
        """
        class_scores = aggregate_token_scores(
            token_logits.float().sigmoid(), positive_map, self.score_aggregation
        )
        pairs, _, num_targets = class_scores.shape
        ranking = class_scores * centerness.float().sigmoid()[..., None]
        ranking = ranking.masked_fill(class_scores <= self.score_thresh, -1.0)
        boxes, scores, classes = [], [], []
        start = 0
        for anchors in anchors_per_level:
            level = slice(start, start + len(anchors))
            start += len(anchors)
            flat = ranking[:, level].flatten(1)  # (P, A_l * K)
            best, index = flat.topk(min(self.pre_nms_topk, flat.shape[1]), dim=1)
            location = index // num_targets
            deltas = box_deltas[:, level].float()
            deltas = deltas.gather(1, location[..., None].expand(-1, -1, 4))
            boxes.append(decode_boxes(deltas, anchors[location]))
            scores.append(best)
            classes.append(index % num_targets)
        boxes, scores, classes = (torch.cat(x, dim=1) for x in (boxes, scores, classes))
        return [self._select(boxes[i], scores[i], classes[i], image_sizes[i]) for i in range(pairs)]

    def _select(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        classes: torch.Tensor,
        image_size: tuple[int, int],
    ) -> Instances:
        candidate = scores >= 0
        boxes, scores, classes = boxes[candidate], scores[candidate].sqrt(), classes[candidate]
        height, width = image_size
        limit = boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])
        boxes = boxes.clamp(min=0).minimum(limit)
        keep = class_aware_nms(boxes, scores, classes, self.nms_thresh)
        if len(keep) > self.max_detections:
            cut = scores[keep[self.max_detections - 1]]
            keep = keep[scores[keep] >= cut]
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes[keep]),
            scores=scores[keep],
            pred_classes=classes[keep],
        )

    def merge(self, results: Sequence[Instances]) -> Instances:
        """One image's detections of several prompts, by descending score."""
        merged = Instances.cat(list(results))
        order = merged.scores.argsort(descending=True, stable=True)
        if self.max_merged_detections:
            order = order[: self.max_merged_detections]
        return merged[order]
