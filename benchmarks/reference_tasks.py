"""What the plain model of `reference.py` is for: losses of a batch, and detections of an image.

One image at a time and one class after another, the token loss with a dense target, and each prompt
of an image passes through everything, image tower included. Box arithmetic and the assignment are
the product's, which make no difference in time here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from reference import Outputs, ReferenceFIBER
from torchvision.ops import nms

from fiber_d2.modeling.assigner import ATSSAssigner
from fiber_d2.modeling.boxes import centerness_targets, decode_boxes, generalized_iou
from fiber_d2.structures import Prompt


class Detections(NamedTuple):
    """Boxes ``(N, 4)``, scores ``(N,)`` in descending order and classes ``(N,)``."""

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor


def reference_losses(
    model: ReferenceFIBER, batch: Sequence[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """As the product's in training, from the same inputs."""
    images, ids, mask = model.prepare([x["image"] for x in batch], [x["prompt"] for x in batch])
    outputs = model(images, ids, mask)
    settings = model.loss_settings
    assigner = ATSSAssigner(settings.assigner.topk)
    anchors = torch.cat(outputs.anchors)
    targets = torch.zeros_like(outputs.token_logits)
    box_losses, centerness_losses, weights = [], [], []
    num_positive = 0
    for i, item in enumerate(batch):
        instances = item["instances"]
        boxes = instances.gt_boxes.tensor
        given = instances.gt_positive_map.float()
        valid = torch.ones(1, len(boxes), dtype=torch.bool)
        assigned = assigner(outputs.anchors, boxes[None], valid)[0]
        positive = assigned >= 0
        num_positive += int(positive.sum())
        targets[i, positive, : given.shape[1]] = given[assigned[positive]]
        if targets.shape[2] > settings.no_object_column:
            targets[i, ~positive, settings.no_object_column] = 1
        truth, chosen = boxes[assigned[positive]], anchors[positive]
        weight = centerness_targets(truth, chosen)
        decoded = decode_boxes(outputs.box_deltas[i, positive], chosen)
        box_losses.append(((1 - generalized_iou(decoded, truth)) * weight).sum())
        centerness_losses.append(
            F.binary_cross_entropy_with_logits(
                outputs.centerness[i, positive], weight, reduction="sum"
            )
        )
        weights.append(weight.sum())
    token_loss = focal_loss(
        outputs.token_logits, targets, mask, settings.focal_alpha, settings.focal_gamma
    )
    num_positive = max(num_positive, 1)
    total = torch.stack(weights).sum().clamp(min=1e-6)
    return {
        "loss_token": token_loss / num_positive,
        "loss_box": settings.box_weight * torch.stack(box_losses).sum() / total,
        "loss_centerness": torch.stack(centerness_losses).sum() / num_positive,
    }


def focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """Sum of the sigmoid focal loss over ``(B, A, T)``, columns that ``mask`` leaves out apart."""
    probability = logits.sigmoid()
    right = probability * targets + (1 - probability) * (1 - targets)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (balance * (1 - right) ** gamma * entropy * mask[:, None, :].float()).sum()


@torch.no_grad()
def reference_detect(
    model: ReferenceFIBER, image: torch.Tensor, prompts: Sequence[Prompt]
) -> Detections:
    """Of one image, each prompt by itself."""
    found = []
    for prompt in prompts:
        outputs = model(*model.prepare([image], [prompt]))
        found.append(reference_postprocess(model.settings, outputs, prompt, image.shape[1:]))
    joined = Detections(*(torch.cat(parts) for parts in zip(*found)))
    order = joined.scores.sort(descending=True, stable=True).indices
    return Detections(*(part[order] for part in joined))


@torch.no_grad()
def reference_postprocess(
    settings: Any, outputs: Outputs, prompt: Prompt, size: Sequence[int]
) -> Detections:
    """Of the first image of ``outputs``, whose unpadded height and width are ``size``."""
    probability = outputs.token_logits[0].sigmoid()
    class_scores = probability.new_zeros(len(probability), prompt.num_targets)
    for number, row in enumerate(prompt.positive_map):
        tokens = row.nonzero().flatten()
        if len(tokens):
            class_scores[:, number] = probability[:, tokens].mean(dim=1)
    ranking = class_scores * outputs.centerness[0].sigmoid()[:, None]
    boxes, scores, classes = [], [], []
    start = 0
    for anchors in outputs.anchors:
        stop = start + len(anchors)
        place, label = (class_scores[start:stop] > settings.score_thresh).nonzero(as_tuple=True)
        score = ranking[start:stop][place, label]
        score, best = score.topk(min(settings.pre_nms_topk, len(score)))
        place, label = place[best], label[best]
        box = decode_boxes(outputs.box_deltas[0, start:stop][place], anchors[place])
        box[:, 0::2] = box[:, 0::2].clamp(0, size[1] - 1)
        box[:, 1::2] = box[:, 1::2].clamp(0, size[0] - 1)
        boxes.append(box)
        scores.append(score.sqrt())
        classes.append(label)
        start = stop
    boxes, scores, classes = torch.cat(boxes), torch.cat(scores), torch.cat(classes)
    kept = []
    for label in range(prompt.num_targets):
        members = (classes == label).nonzero().flatten()
        ends = boxes[members].double() + torch.tensor([0.0, 0.0, 1.0, 1.0])
        kept.append(members[nms(ends, scores[members].double(), settings.nms_thresh)])
    keep = torch.cat(kept)
    keep = keep[scores[keep].sort(descending=True, stable=True).indices]
    if len(keep) > settings.max_detections:
        keep = keep[scores[keep] >= scores[keep[settings.max_detections - 1]]]
    return Detections(boxes[keep], scores[keep], prompt.target_ids[classes[keep]])
