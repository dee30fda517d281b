"""Dynamic head (arXiv:2106.08322): scale-, space- and task-aware attention over the pyramid.

The model specification, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fiber_d2.layers import (
    DyReLU,
    call_block,
    flat_offset_view,
    hard_sigmoid,
    modulated_deform_conv2d,
    resampled_offset_view,
)
from fiber_d2.layers.compilable import compilable
from fiber_d2.layers.compiled import is_bfloat16_fast

_OFFSET_VIEWS = {"flat": flat_offset_view, "resampled": resampled_offset_view}
KERNEL = 3


def _multiplied_in_bfloat16(device: torch.device) -> bool:
    """Whether deformable convolutions multiply in bfloat16 here and now."""
    return (
        device.type == "cpu"
        and is_bfloat16_fast()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class DeformConvNorm(nn.Module):
    """3x3 modulated deformable convolution with bias, then GroupNorm.

    float32 under autocast too, but for the products of maps and weights that come in bfloat16.
    """

    def __init__(self, channels: int, *, stride: int, norm_groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, channels, KERNEL, KERNEL))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.norm = nn.GroupNorm(norm_groups, channels)
        bound = (channels * KERNEL**2) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``x`` (P, C, H, W), ``offset`` (P, 18, h, w), ``mask`` (P, 9, h, w) -> (P, C, h, w)."""
        weight, bias = self.weight, self.bias
        if _multiplied_in_bfloat16(x.device):
            x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(weight.dtype)
            x = modulated_deform_conv2d(
                x, offset.float(), mask.float(), weight, bias, stride=self.stride
            )
            return self.norm(x)


class DynamicHeadBlock(nn.Module):
    """One block of the head: every level mixes with its neighbours.

    Args:
        channels: C of all levels.
        norm_groups: groups of the GroupNorms.
        offset_addressing: how the convolution that works on the next coarser level reads this
            level's offsets, ``"flat"`` (as the published weights need) or ``"resampled"``.
        zero_init_offsets: start as plain convolutions; False leaves PyTorch's initialisation.
    """

    def __init__(
        self, channels: int, *, norm_groups: int, offset_addressing: str, zero_init_offsets: bool
    ) -> None:
        super().__init__()
        if offset_addressing not in _OFFSET_VIEWS:
            raise ValueError(
                f"offset_addressing is {offset_addressing!r}; it must be one of "
                f"{sorted(_OFFSET_VIEWS)}."
            )
        self.offset_view = _OFFSET_VIEWS[offset_addressing]
        self.from_coarser = DeformConvNorm(channels, stride=1, norm_groups=norm_groups)
        self.same_level = DeformConvNorm(channels, stride=1, norm_groups=norm_groups)
        self.from_finer = DeformConvNorm(channels, stride=2, norm_groups=norm_groups)
        self.offset = nn.Conv2d(channels, 3 * KERNEL**2, KERNEL, padding=1)
        self.scale_attention = nn.Conv2d(channels, 1, 1)
        self.activation = DyReLU(channels)
        nn.init.normal_(self.scale_attention.weight, std=0.01)
        nn.init.zeros_(self.scale_attention.bias)
        if zero_init_offsets:
            nn.init.zeros_(self.offset.weight)
            nn.init.zeros_(self.offset.bias)

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Levels ``(P, C, H_l, W_l)``, finest first, to the same shapes."""
        if _multiplied_in_bfloat16(levels[0].device):
            levels = [level.bfloat16() for level in levels]  # once for all that read them
        outputs = []
        for number, feature in enumerate(levels):
            offset, mask = self.offset(feature).split([2 * KERNEL**2, KERNEL**2], dim=1)
            mask = mask.sigmoid()
            results = [self.same_level(feature, offset, mask)]
            if number > 0:
                results.append(self.from_finer(levels[number - 1], offset, mask))
            if number < len(levels) - 1:
                coarser = levels[number + 1]
                size = coarser.shape[-2:]
                mixed = self.from_coarser(
                    coarser, self.offset_view(offset, *size), self.offset_view(mask, *size)
                )
                results.append(
                    F.interpolate(
                        mixed, size=feature.shape[-2:], mode="bilinear", align_corners=True
                    )
                )
            # Factors of whole maps: a few numbers, but what they are rounded to is everywhere.
            with torch.autocast(feature.device.type, enabled=False):
                scaled = [result * self._scale(result) for result in results]
                outputs.append(self.activation(sum(scaled) / len(scaled)))
        return outputs

    def _scale(self, x: torch.Tensor) -> torch.Tensor:
        """Scale attention ``(P, 1, 1, 1)`` of one result."""
        return hard_sigmoid(F.relu(self.scale_attention(x.mean(dim=(2, 3), keepdim=True))))


class DynamicHead(nn.Sequential):
    """A stack of :class:`DynamicHeadBlock`.

    Args:
        channels, norm_groups, offset_addressing, zero_init_offsets: of each block.
        num_blocks: how many.
        checkpoint: keep the input of each block in training, and compute the block again in the
            backward pass.

    Attributes:
        compile_backend: of torch.compile, which runs the stack where this is not None.
    """

    compile_backend: str | None = None

    def __init__(
        self,
        *,
        channels: int = 256,
        num_blocks: int = 6,
        norm_groups: int = 16,
        offset_addressing: str = "flat",
        zero_init_offsets: bool = True,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(
            *(
                DynamicHeadBlock(
                    channels,
                    norm_groups=norm_groups,
                    offset_addressing=offset_addressing,
                    zero_init_offsets=zero_init_offsets,
                )
                for _ in range(num_blocks)
            )
        )
        self.channels = channels
        self.checkpoint = checkpoint

    @compilable
    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Levels ``(P, C, H_l, W_l)``, finest first, to the same shapes."""
        for block in self:
            levels = call_block(partial(_of_levels, block), *levels, recompute=self.checkpoint)
        return list(levels)


def _of_levels(block: DynamicHeadBlock, *levels: torch.Tensor) -> list[torch.Tensor]:
    return block(levels)
