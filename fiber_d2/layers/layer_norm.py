"""LayerNorm that keeps float32 under mixed precision on every device."""

from __future__ import annotations

import torch
from torch import nn


class LayerNorm(nn.LayerNorm):
    """As PyTorch's, computed and returned in the type of its weights, ``(..., C)`` to the same.

    Autocast does this on GPUs. On CPUs it would hand bfloat16 through, and with it the residual
    stream of whole towers would be rounded to 8 bits after every layer.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))
