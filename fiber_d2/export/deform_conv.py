"""Deformable convolution in forms that exported graphs can hold.

The compiled operator of this package is in no other runtime. ``FORMS`` names what can stand in for
it, chosen by who exports:

- ``"operator"``: ``torchvision::deform_conv2d``, which becomes DeformConv in ONNX (operator set 19
  and later). Programs of ``torch.export`` that hold it need torchvision where they are loaded.
- ``"grid_sample"``: one bilinear sampling of the nine kernel positions and a matrix product, in
  operators that every runtime has. Sampling positions are rounded to about a millionth of the
  map's size on the way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from fiber_d2.modeling.dyhead import DeformConvNorm

FORMS = ("operator", "grid_sample")


class ExportedDeformConv(nn.Module):
    """A :class:`~fiber_d2.modeling.dyhead.DeformConvNorm` in one of ``FORMS``; shares weights.

    Args:
        layer: replaced.
        form: of ``FORMS``.
    """

    def __init__(self, layer: DeformConvNorm, form: str) -> None:
        super().__init__()
        self.stride = layer.stride
        self.weight = layer.weight
        self.bias = layer.bias
        self.norm = layer.norm
        self.form = form

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``x`` (P, C, H, W), ``offset`` (P, 18, h, w), ``mask`` (P, 9, h, w) -> (P, C, h, w)."""
        if self.form == "operator":
            x = deform_conv2d(
                x, offset, self.weight, self.bias, stride=self.stride, padding=1, mask=mask
            )
        else:
            x = deform_conv2d_by_grid_sample(
                x, offset, mask, self.weight, self.bias, stride=self.stride, padding=1
            )
        return self.norm(x)


def deform_conv2d_by_grid_sample(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: int,
    padding: int,
) -> torch.Tensor:
    """As :func:`~fiber_d2.layers.modulated_deform_conv2d`, by ``F.grid_sample``."""
    batch, channels, height, width = x.shape
    out_channels, _, kernel, _ = weight.shape
    out_h, out_w = offset.shape[2:]
    points = kernel * kernel
    device = x.device
    tap = torch.arange(kernel, device=device)
    row = (tap.repeat_interleave(kernel) - padding)[:, None, None]  # (k*k, 1, 1)
    column = (tap.repeat(kernel) - padding)[:, None, None]
    row = row + torch.arange(out_h, device=device)[:, None] * stride  # (k*k, h, 1)
    column = column + torch.arange(out_w, device=device) * stride  # (k*k, 1, w)
    offset = offset.unflatten(1, (points, 2))  # (B, k*k, 2, h, w)
    y, x_position = row + offset[:, :, 0], column + offset[:, :, 1]
    # To -1..1 between the outer edges of the outer pixels: defined for a single pixel, too.
    grid = torch.stack([(2 * x_position + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    sampled = F.grid_sample(x, grid.flatten(1, 2), padding_mode="zeros", align_corners=False)
    sampled = sampled.unflatten(2, (points, out_h)) * mask[:, None]  # (B, C, k*k, h, w)
    sampled = sampled.permute(0, 3, 4, 1, 2).flatten(3)  # (B, h, w, C*k*k)
    return F.linear(sampled, weight.flatten(1), bias).permute(0, 3, 1, 2)


def check_form(form: str) -> None:
    """
    Raises:
        ValueError: a form that is not one of ``FORMS``.
    """
    if form not in FORMS:
        raise ValueError(f"deform_conv is {form!r}; it must be one of {', '.join(FORMS)}.")


def replace_deform_convs(model: nn.Module, form: str) -> nn.Module:
    """Put :class:`ExportedDeformConv` in the place of each deformable convolution of ``model``.

    Raises:
        ValueError: a form that is not one of ``FORMS``.
    """
    check_form(form)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DeformConvNorm):
                setattr(parent, name, ExportedDeformConv(child, form))
    return model
