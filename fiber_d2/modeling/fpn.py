"""Feature pyramid p3..p7 (arXiv:1612.03144, extra levels as in arXiv:1708.02002).

The model specification, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fiber_d2.layers import DropBlock2d

from .pairs import of_pairs


class FeaturePyramid(nn.Module):
    """Top-down pyramid over c3, c4, c5 with two strided levels on top.

    Args:
        in_channels: channels of c3, c4, c5.
        out_channels: channels of every output.
        drop_block: DropBlock probability on the merged maps in training.
        drop_block_size: side of a block in positions.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int] = (256, 512, 1024),
        out_channels: int = 256,
        drop_block: float = 0.3,
        drop_block_size: int = 3,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.laterals = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.outputs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels
        )
        self.p6 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        self.drop_block = DropBlock2d(drop_block, drop_block_size)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                nn.init.zeros_(conv.bias)

    def forward(
        self,
        features: Sequence[torch.Tensor],
        shared: int = 0,
        image_index: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """c3, c4, c5, finest first, to p3..p7, finest first.

        Args:
            features: ``(P, C_i, H_i, W_i)`` each.
            shared: so many of the first are of images, ``(B, C_i, H_i, W_i)``, not of pairs.
            image_index: ``(P,)``, the image of each pair; None where they are the same.
        """

        def lateral_of(i: int) -> torch.Tensor:
            return of_pairs(self.laterals[i](features[i]), image_index if i < shared else None)

        merged = lateral_of(len(features) - 1)
        levels = [self.outputs[-1](merged)]
        for i in range(len(features) - 2, -1, -1):
            lateral = lateral_of(i)
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            levels.insert(0, self.outputs[i](self.drop_block(merged)))
        levels.append(_strided(self.p6, levels[-1]))
        levels.append(_strided(self.p7, F.relu(levels[-1])))
        return levels


def _strided(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """``conv(x)``; one-pixel maps in float32 under autocast, too.

    On CPUs, torch 2.14 leaves the bfloat16 weight gradient of a 3x3 convolution of stride 2
    uninitialised where its input is a single pixel: what was in that memory, NaN included, would
    reach the optimiser. p7 meets this in images up to 64 pixels, and costs nothing there.
    """
    if x.shape[-2:] != (1, 1):
        return conv(x)
    with torch.autocast(x.device.type, enabled=False):
        return conv(x.to(conv.weight.dtype))
