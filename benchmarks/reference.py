"""FIBER written plainly: what the product is compared with, in numbers and in time.

Everything is as the model specification says it and nothing is shared or saved: the text is
projected to keys and values again for each window, masks and position biases are made in each
block, attention is written out, deformable convolutions are torchvision's, and captions are padded
to the full width of the text tower. Its blocks are in `reference_parts.py`; `reference_tasks.py`
trains and detects with it. Anchors come from the product; float32 on CPUs only.

Parameters have the product's names, so that its state dict fits.

Letters: B images, C channels, T tokens, A anchors of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from reference_parts import (
    Block,
    Embeddings,
    HeadBlock,
    Layer,
    Merging,
    Pyramid,
    TextAttention,
)
from torch import nn

from fiber_d2.modeling import FIBER
from fiber_d2.structures import Prompt


class Outputs(NamedTuple):
    """Of the head: anchors ``(A_l, 4)`` per level, logits ``(B, A, T)``, deltas ``(B, A, 4)`` and
    centerness ``(B, A)``."""

    anchors: list[torch.Tensor]
    token_logits: torch.Tensor
    box_deltas: torch.Tensor
    centerness: torch.Tensor


class ReferenceFIBER(nn.Module):
    """The model, of the sizes and with the weights of a product's.

    Args:
        model: whose numbers this one gives. Weights are shared, not copied; gradients are not.
        text_length: what captions are padded to.
    """

    def __init__(self, model: FIBER, *, text_length: int = 256) -> None:
        super().__init__()
        self.text_length = text_length
        self.anchors = model.head.anchors
        self.loss_settings, self.settings = model.head.loss, model.head.postprocessor
        with torch.device("meta"):
            self.backbone = _backbone_like(model)
            self.head = _head_like(model)
        self.load_state_dict(model.state_dict(), assign=True)
        self.train(model.training)

    def forward(self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Outputs:
        """Normalised images ``(B, 3, H, W)``, captions ``(B, T)``, one for each image."""
        swin, layers = self.backbone["swin"], self.backbone["text"]["layers"]
        text = self.backbone["text"]["embeddings"](ids)
        fused = [layer for layer in layers if layer.image_attention is not None]
        for layer in layers[: len(layers) - len(fused)]:
            text = layer(text, mask)
        x = swin["patch_embed"]["proj"](images).permute(0, 2, 3, 1)
        x = swin["patch_embed"]["norm"](x)
        features = []
        for number, stage in enumerate(swin["stages"]):
            for block in stage["blocks"]:
                if block.attn.text_attention is None:
                    x = block(x)
                else:
                    layer = fused.pop(0)
                    x, text = block(x, text, mask), layer(text, mask, x.flatten(1, 2))
            if number > 0:
                features.append(swin["out_norms"][number - 1](x).permute(0, 3, 1, 2).contiguous())
            if "downsample" in stage:
                x = stage["downsample"](x)
        levels = self.backbone["neck"](*features)
        for block in self.head["tower"]:
            levels = block(levels)
        return self.predict(levels, text, mask)

    def predict(
        self, levels: list[torch.Tensor], text: torch.Tensor, mask: torch.Tensor
    ) -> Outputs:
        head = self.head
        text = text * mask[:, :, None]
        text = text / text.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        tokens = head["text_projection"](text / 2)
        logits, deltas, centerness = [], [], []
        for x, scale in zip(levels, head.scales):
            flat = x.flatten(2).transpose(1, 2)  # (B, H*W, C)
            level = flat @ tokens.transpose(1, 2) / head.log_scale.exp()
            level = level + (text @ head.text_bias + head.prior_bias)[:, None, :]
            logits.append(level.clamp(-50000, 50000))
            deltas.append((head["bbox_pred"](x) * scale).flatten(2).transpose(1, 2))
            centerness.append(head["centerness"](x).flatten(1))
        return Outputs(
            self.anchors(levels),
            torch.cat(logits, dim=1),
            torch.cat(deltas, dim=1),
            torch.cat(centerness, dim=1),
        )

    def prepare(
        self, images: Sequence[torch.Tensor], prompts: Sequence[Prompt]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The inputs of :meth:`forward`."""
        mean = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
        std = torch.tensor([57.375, 57.12, 58.395]).view(3, 1, 1)
        height, width = (-(-max(x.shape[i] for x in images) // 32) * 32 for i in (1, 2))
        batch = torch.zeros(len(images), 3, height, width)
        ids = torch.ones(len(images), self.text_length, dtype=torch.int64)
        mask = torch.zeros(len(images), self.text_length, dtype=torch.bool)
        for i, (image, prompt) in enumerate(zip(images, prompts)):
            batch[i, :, : image.shape[1], : image.shape[2]] = (image - mean) / std
            ids[i, : prompt.num_tokens] = prompt.input_ids
            mask[i, : prompt.num_tokens] = prompt.attention_mask
        return batch, ids, mask


def _backbone_like(model: FIBER) -> nn.ModuleDict:
    swin, text, neck = model.backbone.swin, model.backbone.text, model.backbone.neck
    text_dim = text.dim
    stages = []
    for number, stage in enumerate(swin.stages):
        blocks = []
        for block in stage.blocks:
            heads, reads = block.attn.num_heads, block.attn.text_attention
            dim = swin.dims[number]
            reader = None
            if reads is not None:
                query_norm = isinstance(reads.norm, nn.LayerNorm)
                reader = TextAttention(dim, text_dim, heads, query_norm)
            drop = block.drop_path.drop_prob
            blocks.append(Block(dim, heads, block.attn.window, block.attn.shift, reader, drop))
        parts = {"blocks": nn.ModuleList(blocks)}
        if stage.downsample is not None:
            parts["downsample"] = Merging(swin.dims[number])
        stages.append(nn.ModuleDict(parts))
    dropout = text.embeddings.dropout
    layers = []
    for layer in text.layers:
        reads = layer.image_attention
        image_dim = None if reads is None else reads.attention.key.in_features
        heads, mlp_dim = layer.attention.num_heads, layer.fc1.out_features
        layers.append(Layer(text_dim, heads, mlp_dim, image_dim, dropout))
    words, places = text.embeddings.word, text.embeddings.position
    patch = swin.patch_size
    return nn.ModuleDict(
        {
            "swin": nn.ModuleDict(
                {
                    "patch_embed": nn.ModuleDict(
                        {
                            "proj": nn.Conv2d(3, swin.dims[0], patch, patch),
                            "norm": nn.LayerNorm(swin.dims[0]),
                        }
                    ),
                    "stages": nn.ModuleList(stages),
                    "out_norms": nn.ModuleList(nn.LayerNorm(dim) for dim in swin.dims[1:]),
                }
            ),
            "text": nn.ModuleDict(
                {
                    "embeddings": Embeddings(
                        words.num_embeddings, text_dim, places.num_embeddings, dropout
                    ),
                    "layers": nn.ModuleList(layers),
                }
            ),
            "neck": Pyramid(
                swin.dims[1:],
                neck.out_channels,
                neck.drop_block.drop_prob,
                neck.drop_block.block_size,
            ),
        }
    )


def _head_like(model: FIBER) -> nn.ModuleDict:
    channels, text_dim = model.head.tower.channels, model.backbone.text.dim
    groups = model.head.tower[0].same_level.norm.num_groups
    head = nn.ModuleDict(
        {
            "tower": nn.ModuleList(HeadBlock(channels, groups) for _ in model.head.tower),
            "bbox_pred": nn.Conv2d(channels, 4, 1),
            "centerness": nn.Conv2d(channels, 1, 1),
            "text_projection": nn.Linear(text_dim, channels),
        }
    )
    for name, size in (("scales", 5), ("log_scale", 1), ("prior_bias", 1), ("text_bias", text_dim)):
        head.register_parameter(name, nn.Parameter(torch.empty(size)))
    return head
