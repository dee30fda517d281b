"""ATSS head whose class scores are alignments between anchors and words.

The model specification, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Instances
from torch import nn

from fiber_d2.config import keyword_arguments
from fiber_d2.layers import Linear

from .boxes import AnchorGrid
from .dyhead import DynamicHead
from .losses import GroundingLoss
from .postprocess import PostProcessor

MAX_LOGIT = 50000.0


class HeadOutputs(NamedTuple):
    """Predictions at every anchor. Letters: P pairs, A anchors of all levels, T tokens.

    Attributes:
        anchors: ``(A_l, 4)`` per level.
        token_logits: ``(P, A, T)`` alignment of anchor and token.
        box_deltas: ``(P, A, 4)``.
        centerness: logits ``(P, A)``.
        features: output of the dynamic head per level, ``(P, C, H_l, W_l)``.
    """

    anchors: list[torch.Tensor]
    token_logits: torch.Tensor
    box_deltas: torch.Tensor
    centerness: torch.Tensor
    features: list[torch.Tensor]


@PROPOSAL_GENERATOR_REGISTRY.register()
class ATSSLanguageHead(nn.Module):
    """Dynamic head, predictions, losses and post-processing.

    Args:
        tower: the dynamic head; its ``channels`` are the pyramid's.
        anchors: anchor grid over the pyramid's levels.
        text_dim: width D of the text tokens.
        loss: training objective.
        postprocessor: detections from predictions.
        prior_probability: of a token at an anchor before training.
        text_projection_std: of the projection's initial weights. The published 0.02 relies on
            pre-trained towers; from scratch a larger one gives words different directions from
            the first step, without which small models stay for long at "object or not".
        box_scale_init: initial factor of the box regression of every level. An optimiser that
            moves weights by its learning rate takes hundreds of steps to grow the published 1
            and the small initial weights behind it to the size that boxes need.
        log_scale_init: initial logarithm of what token logits are divided by; a negative one
            does the same for the alignment of anchors and words.
    """

    @configurable
    def __init__(
        self,
        *,
        tower: DynamicHead,
        anchors: AnchorGrid,
        text_dim: int,
        loss: GroundingLoss,
        postprocessor: PostProcessor,
        prior_probability: float = 0.01,
        text_projection_std: float = 0.02,
        box_scale_init: float = 1.0,
        log_scale_init: float = 0.0,
    ) -> None:
        super().__init__()
        channels = tower.channels
        self.tower = tower
        self.anchors = anchors
        self.loss = loss
        self.postprocessor = postprocessor
        self.bbox_pred = nn.Conv2d(channels, 4, 1)
        self.centerness = nn.Conv2d(channels, 1, 1)
        for conv in (self.bbox_pred, self.centerness):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        self.scales = nn.Parameter(torch.full((len(anchors.strides),), float(box_scale_init)))
        self.text_projection = Linear(text_dim, channels)
        nn.init.trunc_normal_(self.text_projection.weight, std=text_projection_std, a=-2, b=2)
        nn.init.zeros_(self.text_projection.bias)
        self.log_scale = nn.Parameter(torch.full((1,), float(log_scale_init)))
        self.text_bias = nn.Parameter(torch.zeros(text_dim))
        prior_bias = -math.log((1 - prior_probability) / prior_probability)
        self.prior_bias = nn.Parameter(torch.full((1,), prior_bias))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, object]:
        fiber = cfg.MODEL.FIBER
        channels = next(iter(input_shape.values())).channels
        return {
            "tower": DynamicHead(channels=channels, **keyword_arguments(fiber.TOWER)),
            "anchors": AnchorGrid(**keyword_arguments(fiber.ANCHORS)),
            "text_dim": fiber.TEXT.DIM,
            "loss": GroundingLoss(
                no_object_column=cfg.FIBER.MAX_TOKENS - 1, **keyword_arguments(fiber.LOSS)
            ),
            "postprocessor": PostProcessor(**keyword_arguments(fiber.POSTPROCESS)),
        }

    def forward(
        self, pyramid: Sequence[torch.Tensor], text: torch.Tensor, text_mask: torch.Tensor
    ) -> HeadOutputs:
        """Pyramid levels ``(P, C, H_l, W_l)``, text ``(P, T, D)``, bool mask ``(P, T)``."""
        features = self.tower(pyramid)
        # Scores and boxes in float32: cheap beside the tower, and rounding shows in both.
        with torch.autocast(text.device.type, enabled=False):
            return self._predict(features, text.to(self.text_bias.dtype), text_mask)

    def _predict(
        self, features: list[torch.Tensor], text: torch.Tensor, text_mask: torch.Tensor
    ) -> HeadOutputs:
        anchors = self.anchors(features)
        # (P, A, C), level after level, row by row.
        flat = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], dim=1)
        deltas = torch.cat(
            [
                (self.bbox_pred(feature) * scale).flatten(2).transpose(1, 2)
                for feature, scale in zip(features, self.scales)
            ],
            dim=1,
        )
        centerness = torch.cat([self.centerness(feature).flatten(1) for feature in features], dim=1)
        return HeadOutputs(
            anchors, self._token_logits(flat, text, text_mask), deltas, centerness, features
        )

    def _token_logits(
        self, flat: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        embedding = F.normalize(text * text_mask[..., None], dim=-1, eps=1e-12)
        tokens = self.text_projection(embedding / 2)  # (P, T, C)
        bias = embedding @ self.text_bias + self.prior_bias  # (P, T)
        logits = flat @ tokens.transpose(1, 2) / self.log_scale.exp() + bias[:, None]
        return logits.clamp(-MAX_LOGIT, MAX_LOGIT)

    def losses(
        self,
        outputs: HeadOutputs,
        text_mask: torch.Tensor,
        boxes: torch.Tensor,
        valid: torch.Tensor,
        positive_map: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """See :class:`~fiber_d2.modeling.losses.GroundingLoss`."""
        return self.loss(
            outputs.anchors,
            outputs.token_logits,
            outputs.box_deltas,
            outputs.centerness,
            text_mask,
            boxes,
            valid,
            positive_map,
        )

    def inference(
        self,
        outputs: HeadOutputs,
        positive_map: torch.Tensor,
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """See :class:`~fiber_d2.modeling.postprocess.PostProcessor`."""
        return self.postprocessor(
            outputs.anchors,
            outputs.token_logits,
            outputs.box_deltas,
            outputs.centerness,
            positive_map,
            image_sizes,
        )
