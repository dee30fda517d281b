"""DropBlock (arXiv:1810.12890) as FIBER's feature pyramid uses it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class DropBlock2d(nn.Module):
    """Zeroes square blocks of a map while training, identity otherwise.

    Seeds are drawn with ``drop_prob / block_size**2`` per position, one mask for all channels,
    dilated to blocks; the output is rescaled by the kept share of the whole batch.

    Args:
        drop_prob: about the share of positions dropped, 0 turns the layer off.
        block_size: odd side of a block, in positions.
    """

    def __init__(self, drop_prob: float, block_size: int = 3) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.block_size = block_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` to the same shape."""
        if not self.training or self.drop_prob == 0:
            return x
        seeds = torch.rand(x.shape[0], 1, *x.shape[2:], device=x.device)
        seeds = (seeds < self.drop_prob / self.block_size**2).to(x.dtype)
        dropped = F.max_pool2d(seeds, self.block_size, stride=1, padding=self.block_size // 2)
        kept = 1 - dropped
        return x * kept * (kept.numel() / kept.sum().clamp(min=1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, block_size={self.block_size}"
