"""The fusion backbone: which Swin block meets which RoBERTa layer, and what can be computed once.

The order of computation is that of the model specification, section 2.

Letters: B images, P image-caption pairs, T tokens, D text width. ``image_index`` (P,) tells which
image each pair looks at, so several captions can share the image's part and the reverse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from fiber_d2.config import keyword_arguments
from fiber_d2.layers.compilable import compilable

from .fpn import FeaturePyramid
from .roberta import RobertaEncoder
from .swin import SwinTransformer


class ImagePrefix(NamedTuple):
    """What of an image does not depend on text.

    Attributes:
        tokens: ``(B, H, W, C)`` that enter the first fused block.
        features: normalised outputs ``(B, C_i, H_i, W_i)`` of the stages that are complete.
    """

    tokens: torch.Tensor
    features: tuple[torch.Tensor, ...]

    def select(self, index: torch.Tensor) -> ImagePrefix:
        """The entries of ``index`` along the batch."""
        return ImagePrefix(self.tokens[index], tuple(feature[index] for feature in self.features))


class FusionFeatures(NamedTuple):
    """Result of the exchange.

    Attributes:
        stages: normalised stage outputs c3, c4, c5 as ``(P, C_i, H_i, W_i)``; those that no text
            has met are of the images, ``(B, C_i, H_i, W_i)``.
        pyramid: p3..p7, each ``(P, C, H_l, W_l)``.
        text: final hidden state ``(P, T, D)``, padding included.
    """

    stages: list[torch.Tensor]
    pyramid: list[torch.Tensor]
    text: torch.Tensor


class FusionBackbone(Backbone):
    """Swin and RoBERTa that exchange through cross attention (FIBER, arXiv:2206.07643).

    Args:
        vision: the Swin tower; its ``fused_blocks`` say where text enters.
        text: the RoBERTa tower; its fused layers must be as many as the fused blocks.
        neck: the pyramid over stages 2, 3 and 4.

    Attributes:
        compile_backend: of torch.compile, which runs the three parts of the forward pass where
            this is not None.
    """

    compile_backend: str | None = None

    @configurable
    def __init__(
        self, *, vision: SwinTransformer, text: RobertaEncoder, neck: FeaturePyramid
    ) -> None:
        super().__init__()
        fused_dims = [
            dim for dim, count in zip(vision.dims, vision.fused_blocks) for _ in range(count)
        ]
        found_dims = [
            layer.image_attention.attention.key.in_features
            for layer in text.layers
            if layer.image_attention is not None
        ]
        if fused_dims != found_dims:
            raise ValueError(
                f"The vision tower's fused blocks have widths {fused_dims}, but the text tower "
                f"expects image tokens of widths {found_dims} (image_dims)."
            )
        self.swin = vision
        self.text = text
        self.neck = neck

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, nn.Module]:
        fiber = cfg.MODEL.FIBER
        vision = SwinTransformer(
            in_channels=input_shape.channels,
            text_dim=fiber.TEXT.DIM,
            **keyword_arguments(fiber.VISION),
        )
        image_dims = [
            dim for dim, count in zip(vision.dims, vision.fused_blocks) for _ in range(count)
        ]
        return {
            "vision": vision,
            "text": RobertaEncoder(image_dims=image_dims, **keyword_arguments(fiber.TEXT)),
            "neck": FeaturePyramid(in_channels=vision.dims[1:], **keyword_arguments(fiber.NECK)),
        }

    @property
    def size_divisibility(self) -> int:
        return self.swin.patch_size * 2 ** (len(self.swin.depths) - 1)

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            f"p{level}": ShapeSpec(channels=self.neck.out_channels, stride=2**level)
            for level in range(3, 8)
        }

    def _first_fused(self) -> tuple[int, int]:
        """(stage, block) where the exchange starts; one past the end if there is none."""
        for stage, (depth, fused) in enumerate(zip(self.swin.depths, self.swin.fused_blocks)):
            if fused:
                return stage, depth - fused
        return len(self.swin.depths), 0

    @compilable
    def image_prefix(self, images: torch.Tensor) -> ImagePrefix:
        """Everything before the first fused block, from normalised images ``(B, 3, H, W)``.

        Raises:
            ValueError: if H or W is not a multiple of ``size_divisibility``.
        """
        height, width = images.shape[-2:]
        if height % self.size_divisibility or width % self.size_divisibility:
            raise ValueError(
                f"Image batch of {height}x{width} pixels: both sides must be multiples of "
                f"{self.size_divisibility}; pad the batch."
            )
        first_stage, first_block = self._first_fused()
        x = self.swin.patch_embed(images)
        features: list[torch.Tensor] = []
        for number, stage in enumerate(self.swin.stages):
            if number == first_stage:
                for block in stage.blocks[:first_block]:
                    x = self.swin.call(block, x)
                break
            for block in stage.blocks:
                x = self.swin.call(block, x)
            x = self._finish_stage(number, x, features)
        return ImagePrefix(x, tuple(features))

    @compilable
    def text_prefix(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Text layers before the first exchange: ids, bool mask ``(P, T)`` -> ``(P, T, D)``."""
        embeddings, *layers = self.text.text_only()
        x = embeddings(input_ids)
        for layer in layers:
            x = self.text.call(layer, x, attention_mask)
        return x

    @compilable
    def exchange(
        self,
        prefix: ImagePrefix,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor | None = None,
    ) -> FusionFeatures:
        """From the prefixes of B images and P captions to the pyramid and the final text of P
        pairs. What does not depend on the caption is computed once per image.

        Args:
            prefix: of the images.
            text: ``(P, T, D)`` of :meth:`text_prefix`.
            attention_mask: bool ``(P, T)``.
            image_index: ``(P,)``, the image of each caption; None where there is one caption to
                an image, in order.
        """
        index = image_index  # until the tokens are those of pairs
        x, features = prefix.tokens, list(prefix.features)
        text_layers = iter(self.text.layers[self.text.num_text_only :])
        first_stage, first_block = self._first_fused()
        for number, stage in enumerate(self.swin.stages):
            if number < first_stage:
                continue
            for block in stage.blocks[first_block if number == first_stage else 0 :]:
                if block.attn.text_attention is None:
                    x = self.swin.call(block, x)
                    continue
                # Both sides read the same incoming pair, then both are replaced.
                layer = next(text_layers)
                x, text = (
                    self.swin.call(block, x, text, attention_mask, index),
                    self.text.call(layer, text, attention_mask, x.flatten(1, 2), index),
                )
                index = None
            x = self._finish_stage(number, x, features)
        pyramid = self.neck(features, len(prefix.features), image_index)
        return FusionFeatures(features, pyramid, text)

    def _finish_stage(
        self, number: int, x: torch.Tensor, features: list[torch.Tensor]
    ) -> torch.Tensor:
        """Append the normalised output of a stage and lead its raw output to the next one."""
        if number > 0:
            normalised = self.swin.out_norms[number - 1](x)
            features.append(normalised.permute(0, 3, 1, 2).contiguous())
        downsample = self.swin.stages[number].downsample
        return x if downsample is None else self.swin.call(downsample, x)

    def forward(
        self,
        images: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor | None = None,
    ) -> FusionFeatures:
        """Images ``(B, 3, H, W)`` and captions ``(P, T)``; pair ``i`` looks at image
        ``image_index[i]``, or at image ``i`` where no index is given."""
        prefix = self.image_prefix(images)
        text = self.text_prefix(input_ids, attention_mask)
        return self.exchange(prefix, text, attention_mask, image_index)


@BACKBONE_REGISTRY.register()
def build_fiber_fusion_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FusionBackbone:
    """The fusion backbone that ``cfg.MODEL.FIBER`` describes; ``input_shape`` is the image's."""
    return FusionBackbone(cfg, input_shape)
