"""Dynamic ReLU (DyReLU-B, arXiv:2003.10027), the task-aware activation of the dynamic head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def hard_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """``relu6(x + 3) / 6``, any shape."""
    return F.relu6(x + 3) / 6


class DyReLU(nn.Module):
    """Maximum of two linear functions whose slopes and offsets depend on the map's mean.

    Input and output ``(B, C, H, W)``.
    """

    def __init__(self, channels: int, *, reduction: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, 4 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta = hard_sigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3))))))
        a1, b1, a2, b2 = theta[:, :, None, None].chunk(4, dim=1)  # each (B, C, 1, 1)
        first = x * (2 * (a1 - 0.5) + 1) + (b1 - 0.5)
        second = x * (2 * (a2 - 0.5)) + (b2 - 0.5)
        return torch.maximum(first, second)
