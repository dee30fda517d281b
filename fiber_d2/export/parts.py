"""What is exported: the whole detector, or three parts of it, as modules of tensors in and out.

The boundary. Inputs:

- ``image`` float32 ``(B, 3, H, W)``, 0..255, in the channel order that the model was trained with;
  H and W are multiples of 32, reached by padding at the bottom and on the right with the model's
  ``pixel_mean``, which normalises to the zeros that the model was trained with;
- ``input_ids`` int64 and ``attention_mask`` bool ``(B, T)``, caption ``i`` belongs to image ``i``;
- ``positive_map`` float32 ``(B, K, T)``: which tokens stand for which target.

Outputs, at each of the A anchors of all levels:

- ``boxes`` ``(B, A, 4)``, XYXY in pixels of ``image``, not clipped;
- ``class_scores`` ``(B, A, K)`` and ``centerness`` ``(B, A)``, both in 0..1.

Candidates, suppression and limits are left to :mod:`fiber_d2.export.detections`: thresholds stay
free, and runtimes differ most in how they do these.

In parts, ``image_prefix`` turns an image into ``image_tokens`` and ``image_feature_N``,
``text_prefix`` a caption into ``text``; ``fused`` needs these and gives the outputs above. One
image and many captions, or one caption and many images, need their prefix once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from fiber_d2.modeling import FIBER
from fiber_d2.modeling.boxes import decode_boxes
from fiber_d2.modeling.fusion import ImagePrefix
from fiber_d2.modeling.postprocess import aggregate_token_scores

from .deform_conv import replace_deform_convs

OUTPUTS = ("boxes", "class_scores", "centerness")
# Sizes that are traced, all different, and none that some layer treats in a special way. Of the
# image in units of 32 pixels.
_BATCH, _ROWS, _COLUMNS, _TOKENS, _TARGETS = 3, 25, 42, 11, 5


@dataclass(frozen=True)
class Graph:
    """One thing to export.

    Attributes:
        name: of its file, without the ending.
        module: takes ``arguments`` in their order.
        arguments: examples, by name.
        dynamic_shapes: for each argument, which sizes may vary, as ``torch.export`` takes them.
        outputs: names of what it returns.
    """

    name: str
    module: nn.Module
    arguments: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, Any]]
    outputs: tuple[str, ...]


class TextPart(nn.Module):
    """``input_ids``, ``attention_mask`` to ``text`` (P, T, D)."""

    def __init__(self, model: FIBER) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.backbone.text_prefix(input_ids, attention_mask)


class ImagePart(nn.Module):
    """``image`` to ``image_tokens`` (B, h, w, C) and each ``image_feature_N`` (B, C, h, w)."""

    def __init__(self, model: FIBER) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.unit = model.backbone.size_divisibility
        self.register_buffer("pixel_mean", model.pixel_mean.clone(), persistent=False)
        self.register_buffer("pixel_std", model.pixel_std.clone(), persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Says that both are multiples; what follows is traced in sizes without remainders.
        rows, columns = (size // self.unit for size in image.shape[2:])
        image = _as_multiple(_as_multiple(image, 2, rows, self.unit), 3, columns, self.unit)
        prefix = self.backbone.image_prefix((image - self.pixel_mean) / self.pixel_std)
        return (prefix.tokens, *prefix.features)


class FusedPart(nn.Module):
    """``image_tokens``, ``image_feature_N``..., ``text``, ``attention_mask``, ``positive_map`` to
    the outputs."""

    def __init__(self, model: FIBER, units: Sequence[int]) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head
        self.aggregation = model.head.postprocessor.score_aggregation
        # Of the tokens and of each feature, how many a side of an image's 32 pixels has.
        self.units = tuple(units)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens, *features, text, attention_mask, positive_map = inputs
        unit, *others = self.units
        rows, columns = (size // unit for size in tokens.shape[1:3])
        tokens = _as_multiple(_as_multiple(tokens, 1, rows, unit), 2, columns, unit)
        features = [
            _as_multiple(_as_multiple(x, 2, rows, unit), 3, columns, unit)
            for x, unit in zip(features, others)
        ]
        return self.detect(ImagePrefix(tokens, tuple(features)), text, attention_mask, positive_map)

    def detect(
        self,
        prefix: ImagePrefix,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        positive_map: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        features = self.backbone.exchange(prefix, text, attention_mask)
        found = self.head(features.pyramid, features.text, attention_mask)
        class_scores = aggregate_token_scores(
            found.token_logits.sigmoid(), positive_map, self.aggregation
        )
        boxes = decode_boxes(found.box_deltas, torch.cat(list(found.anchors)))
        return boxes, class_scores, found.centerness.sigmoid()


class Detector(nn.Module):
    """``image``, ``input_ids``, ``attention_mask``, ``positive_map`` to the outputs."""

    def __init__(self, model: FIBER) -> None:
        super().__init__()
        self.image = ImagePart(model)
        self.text = TextPart(model)
        self.fused = FusedPart(model, ())

    def forward(
        self,
        image: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        positive_map: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        tokens, *features = self.image(image)
        text = self.text(input_ids, attention_mask)
        return self.fused.detect(
            ImagePrefix(tokens, tuple(features)), text, attention_mask, positive_map
        )


class Graphs:
    """What can be exported of a model.

    Args:
        model: it is copied, not changed.
        deform_conv: ``"operator"`` or ``"grid_sample"``, see :mod:`fiber_d2.export.deform_conv`.
    """

    def __init__(self, model: FIBER, *, deform_conv: str = "operator") -> None:
        model = replace_deform_convs(copy.deepcopy(model).cpu().float().eval(), deform_conv)
        model.backbone.compile_backend = model.head.tower.compile_backend = None
        self.model = model
        swin = model.backbone.swin
        fused = [stage for stage, blocks in enumerate(swin.fused_blocks) if blocks]
        # Stages before the first fused one are the image's alone.
        self._first = fused[0] if fused else len(swin.depths)
        self._strides = [swin.patch_size * 2**stage for stage in range(len(swin.depths))]
        self._unit = model.backbone.size_divisibility
        self._inputs = {
            "image": torch.zeros(_BATCH, 3, self._unit * _ROWS, self._unit * _COLUMNS),
            "input_ids": torch.full((_BATCH, _TOKENS), model.backbone.text.pad_token_id + 1),
            "attention_mask": torch.ones(_BATCH, _TOKENS, dtype=torch.bool),
            "positive_map": torch.zeros(_BATCH, _TARGETS, _TOKENS),
        }
        self._varying = {
            "image": (0, 2, 3),
            "input_ids": (0, 1),
            "attention_mask": (0, 1),
            "positive_map": (0, 1, 2),
        }

    def whole(self) -> list[Graph]:
        """The detector."""
        detector = Detector(self.model)
        names = ("image", "input_ids", "attention_mask", "positive_map")
        return [self._graph("model", detector, names, OUTPUTS)]

    def parts(self) -> list[Graph]:
        """Text prefix, image prefix, and the rest.

        Raises:
            ValueError: image and text do not meet in the towers, so there is no rest.
        """
        if self._first == len(self._strides):
            raise ValueError(
                "No block of the vision tower is fused (fused_blocks): the model has no parts to "
                "export, only the whole."
            )
        features = tuple(f"image_feature_{number}" for number in range(self._first - 1))
        image = ("image_tokens", *features)
        text = ("input_ids", "attention_mask")
        self._add_prefixes(features)
        stages = (self._first, *range(1, self._first))
        fused = FusedPart(self.model, [self._unit // self._strides[stage] for stage in stages])
        return [
            self._graph("text_prefix", TextPart(self.model), text, ("text",)),
            self._graph("image_prefix", ImagePart(self.model), ("image",), image),
            self._graph(
                "fused", fused, (*image, "text", "attention_mask", "positive_map"), OUTPUTS
            ),
        ]

    def _graph(
        self, name: str, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> Graph:
        return Graph(
            name,
            module,
            {key: self._inputs[key] for key in inputs},
            {key: dict.fromkeys(self._varying[key], Dim.DYNAMIC) for key in inputs},
            outputs,
        )

    def _add_prefixes(self, features: tuple[str, ...]) -> None:
        """What the prefixes give and the rest takes, among the inputs."""
        swin = self.model.backbone.swin
        per = self._unit // self._strides[self._first]
        self._inputs["image_tokens"] = torch.zeros(
            _BATCH, per * _ROWS, per * _COLUMNS, swin.dims[self._first]
        )
        self._varying["image_tokens"] = (0, 1, 2)
        # The first stage has no normalised output.
        for stage, name in enumerate(features, start=1):
            per = self._unit // self._strides[stage]
            self._inputs[name] = torch.zeros(_BATCH, swin.dims[stage], per * _ROWS, per * _COLUMNS)
            self._varying[name] = (0, 2, 3)
        self._inputs["text"] = torch.zeros(_BATCH, _TOKENS, self.model.backbone.text.dim)
        self._varying["text"] = (0, 1)


def _as_multiple(x: torch.Tensor, dim: int, count: int, unit: int) -> torch.Tensor:
    """``x``, whose size along ``dim`` is ``count * unit``, told in these terms."""
    return x.unflatten(dim, (count, unit)).flatten(dim, dim + 1)
