"""Blocks of the plain model: what `reference.py` is built of.

Letters: B images, C channels, N tokens of a window, T tokens of the text, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth, deform_conv2d

# --- image tower ---------------------------------------------------------------------------------


class TextAttention(nn.Module):
    """Windows ``(B*windows, N, C)`` read the text ``(B, T, D)``, repeated for each of them."""

    def __init__(self, dim: int, text_dim: int, heads: int, query_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim) if query_norm else nn.Identity()
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(text_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
        windows = x.shape[0] // text.shape[0]
        text = text.repeat_interleave(windows, dim=0)
        padding = (~text_mask).float().repeat_interleave(windows, dim=0) * -1e9
        key, value = self.key_value(text).chunk(2, dim=-1)
        query = self.query(self.norm(x))
        mixed = attention(query, key, value, self.heads, padding[:, None, None, :])
        return x + self.alpha * self.proj(mixed)


class WindowAttention(nn.Module):
    def __init__(self, dim: int, window: int, heads: int, text: nn.Module | None) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.text_attention = text

    def position_bias(self) -> torch.Tensor:
        """``(heads, N, N)``."""
        side = self.window
        place = torch.arange(side * side)
        rows, columns = place // side, place % side
        down = rows[:, None] - rows[None, :] + side - 1
        right = columns[:, None] - columns[None, :] + side - 1
        return self.relative_position_bias_table[down * (2 * side - 1) + right].permute(2, 0, 1)


class Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, window: int, shift: int, text: nn.Module | None, drop: float
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads, text)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.drop_path = StochasticDepth(drop, "row")

    def shift_mask(self, height: int, width: int) -> torch.Tensor:
        """``(windows, N, N)``: -100 between tokens that are neighbours only by the shift."""
        regions = torch.zeros(1, height, width, 1)
        number = 0
        edges = (0, -self.window, -self.shift, None)
        for top, bottom in zip(edges, edges[1:]):
            for left, right in zip(edges, edges[1:]):
                regions[:, top:bottom, left:right] = number
                number += 1
        regions = to_windows(regions, self.window)[:, :, 0]
        return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)

    def forward(
        self,
        x: torch.Tensor,
        text: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(B, H, W, C)`` to the same."""
        batch, height, width, dim = x.shape
        side, shift = self.window, self.shift
        y = F.pad(self.norm1(x), (0, 0, 0, -width % side, 0, -height % side))
        padded = y.shape[1:3]
        if shift:
            y = y.roll((-shift, -shift), (1, 2))
        y = to_windows(y, side)
        query, key, value = self.attn.qkv(y).chunk(3, dim=-1)
        bias = self.attn.position_bias()[None]
        if shift:
            bias = bias + self.shift_mask(*padded).repeat(batch, 1, 1)[:, None]
        y = self.attn.proj(attention(query, key, value, self.attn.heads, bias))
        if self.attn.text_attention is not None:
            y = self.attn.text_attention(y, text, text_mask)
        y = y.view(batch, padded[0] // side, padded[1] // side, side, side, dim)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, *padded, dim)
        if shift:
            y = y.roll((shift, shift), (1, 2))
        x = x + self.drop_path(y[:, :height, :width])
        return x + self.drop_path(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


def to_windows(x: torch.Tensor, side: int) -> torch.Tensor:
    """``(B, H, W, C)`` to ``(B*windows, N, C)``."""
    batch, height, width, dim = x.shape
    x = x.view(batch, height // side, side, width // side, side, dim)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, dim)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    bias: torch.Tensor | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Of ``(B, N, C)`` to ``(B, S, C)``; ``bias`` is added to the scores ``(B, heads, N, S)``."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias
    return (F.dropout(scores.softmax(dim=-1), dropout) @ value).transpose(1, 2).flatten(2)


class Merging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


# --- text tower ----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, context_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(context_dim, dim)
        self.value = nn.Linear(context_dim, dim)
        self.dense = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        mixed = attention(self.query(x), self.key(y), self.value(y), self.heads, bias, dropout)
        return F.dropout(self.dense(mixed), dropout)


class ImageAttention(nn.Module):
    def __init__(self, dim: int, image_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, image_dim, heads, dropout)
        self.alpha = nn.Parameter(torch.zeros(1))


class Layer(nn.Module):
    def __init__(
        self, dim: int, heads: int, mlp_dim: int, image_dim: int | None, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.attention = Attention(dim, dim, heads, dropout)
        self.image_attention = (
            None if image_dim is None else ImageAttention(dim, image_dim, heads, dropout)
        )
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, image: torch.Tensor | None = None
    ) -> torch.Tensor:
        a = self.attention(x, x, (~mask).float()[:, None, None, :] * -1e9)
        if self.image_attention is not None:
            a = a + self.image_attention.alpha * self.image_attention.attention(a, image, None)
        x = self.norm1(a + x)
        return self.norm2(self.dropout(self.fc2(F.gelu(self.fc1(x)))) + x)


class Embeddings(nn.Module):
    def __init__(self, words: int, dim: int, positions: int, dropout: float) -> None:
        super().__init__()
        self.word = nn.Embedding(words, dim)
        self.position = nn.Embedding(positions, dim)
        self.token_type = nn.Embedding(1, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        real = (ids != 1).long()
        place = real.cumsum(dim=1) * real + 1
        x = self.word(ids) + self.position(place) + self.token_type(torch.zeros_like(ids))
        return self.dropout(self.norm(x))


# --- pyramid and dynamic head --------------------------------------------------------------------


class Pyramid(nn.Module):
    def __init__(self, in_channels: Sequence[int], channels: int, drop: float, block: int) -> None:
        super().__init__()
        self.drop, self.block = drop, block
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1) for _ in in_channels)
        self.p6 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)

    def drop_block(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.drop:
            return x
        seeds = torch.rand(x.shape[0], 1, *x.shape[2:]) < self.drop / self.block**2
        kept = 1 - F.max_pool2d(seeds.float(), self.block, 1, self.block // 2)
        return x * kept * kept.numel() / kept.sum().clamp(min=1)

    def forward(self, c3: torch.Tensor, c4: torch.Tensor, c5: torch.Tensor) -> list[torch.Tensor]:
        inner5 = self.laterals[2](c5)
        inner4 = self.laterals[1](c4)
        inner4 = inner4 + F.interpolate(inner5, size=inner4.shape[-2:], mode="nearest")
        inner3 = self.laterals[0](c3)
        inner3 = inner3 + F.interpolate(inner4, size=inner3.shape[-2:], mode="nearest")
        p3 = self.outputs[0](self.drop_block(inner3))
        p4 = self.outputs[1](self.drop_block(inner4))
        p5 = self.outputs[2](inner5)
        p6 = self.p6(p5)
        return [p3, p4, p5, p6, self.p7(F.relu(p6))]


class DeformConv(nn.Module):
    def __init__(self, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.zeros(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.norm(
            deform_conv2d(x, offset, self.weight, self.bias, self.stride, padding=1, mask=mask)
        )


class HeadBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.from_coarser = DeformConv(channels, 1, groups)
        self.same_level = DeformConv(channels, 1, groups)
        self.from_finer = DeformConv(channels, 2, groups)
        self.offset = nn.Conv2d(channels, 27, 3, 1, 1)
        self.scale_attention = nn.Conv2d(channels, 1, 1)
        squeezed = nn.Linear(channels, channels // 4)
        self.activation = nn.ModuleDict(
            {"fc1": squeezed, "fc2": nn.Linear(channels // 4, 4 * channels)}
        )

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = []
        for number, x in enumerate(levels):
            offset, mask = self.offset(x).split([18, 9], dim=1)
            mask = mask.sigmoid()
            results = [self.same_level(x, offset, mask)]
            if number > 0:
                results.append(self.from_finer(levels[number - 1], offset, mask))
            if number + 1 < len(levels):
                coarser = levels[number + 1]
                h, w = coarser.shape[-2:]
                # The memory of this level's offsets, read as if they were the coarser level's.
                flat_offset = torch.stack(
                    [o.flatten()[: 18 * h * w].view(18, h, w) for o in offset]
                )
                flat_mask = torch.stack([m.flatten()[: 9 * h * w] for m in mask])
                result = self.from_coarser(
                    coarser, flat_offset.view(-1, 18, h, w), flat_mask.view(-1, 9, h, w)
                )
                results.append(
                    F.interpolate(result, size=x.shape[-2:], mode="bilinear", align_corners=True)
                )
            scaled = [
                r * F.hardsigmoid(F.relu(self.scale_attention(F.adaptive_avg_pool2d(r, 1))))
                for r in results
            ]
            outputs.append(self.dynamic_relu(torch.stack(scaled).mean(dim=0)))
        return outputs

    def dynamic_relu(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.activation["fc1"](x.mean(dim=(2, 3))))
        theta = F.hardsigmoid(self.activation["fc2"](hidden))[:, :, None, None]
        a1, b1, a2, b2 = (t - 0.5 for t in theta.chunk(4, dim=1))
        return torch.max(x * (2 * a1 + 1) + b1, x * (2 * a2) + b2)
