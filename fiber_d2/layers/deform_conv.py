"""Modulated deformable convolution (Deformable ConvNets v2, arXiv:1811.11168).

Shapes: B batch, C input channels, O output channels, H x W input map, h x w output map, and
``k*k`` kernel positions counted row by row. Offsets hold (dy, dx) per kernel position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

from .compiled import is_compiled
from .linear import linear

# What the compiled operator computes in; other formats take the PyTorch path.
COMPILED_DTYPES = (torch.float32, torch.float64)


def modulated_deform_conv2d(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 1,
) -> torch.Tensor:
    """Deformable convolution with one group, dilation 1 and a modulation mask.

    Args:
        x: ``(B, C, H, W)``.
        offset: ``(B, 2*k*k, h, w)`` displacements in pixels of ``x``, channel order (dy, dx) per
            kernel position.
        mask: ``(B, k*k, h, w)`` modulation of each kernel position.
        weight: ``(O, C, k, k)``.
        bias: ``(O,)`` or None.

    All are of one type, but that ``x``, ``weight`` and ``bias`` may be bfloat16 where ``offset``
    and ``mask`` are float32, on CPUs with the compiled operator: samples are then located, weighted
    and summed in float32, and multiplied with the weight in bfloat16.

    Returns:
        ``(B, O, h, w)``, of the type of ``offset``. Positions outside the map read as zero,
        bilinearly blended at the border.

    On CUDA this is torchvision's kernel, on CPUs the compiled operator of ``csrc/``. Where that was
    not built, the sampling is one ``embedding_bag`` over the four corners of every sampling point
    followed by one matrix product. All results agree; ``benchmarks/deform_conv.py`` times them.
    """
    if x.is_cuda:
        return deform_conv2d(x, offset, weight, bias, stride=stride, padding=padding, mask=mask)
    if x.device.type == "cpu" and offset.dtype in COMPILED_DTYPES and is_compiled():
        return torch.ops.fiber_d2.deform_conv2d(x, offset, mask, weight, bias, stride, padding)
    return _deform_conv2d_embedding_bag(
        x, offset, mask, weight, bias, stride=stride, padding=padding
    )


def _deform_conv2d_embedding_bag(
    x: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: int,
    padding: int,
) -> torch.Tensor:
    batch, channels, height, width = x.shape
    out_channels, _, kernel, _ = weight.shape
    out_h, out_w = offset.shape[-2:]
    points = kernel * kernel
    device, dtype = x.device, x.dtype

    # Regular sampling grid of every kernel position: (k*k, h) rows and (k*k, w) columns.
    steps = torch.arange(kernel, device=device, dtype=dtype)
    kernel_y, kernel_x = steps.repeat_interleave(kernel), steps.repeat(kernel)
    grid_y = torch.arange(out_h, device=device, dtype=dtype) * stride - padding
    grid_x = torch.arange(out_w, device=device, dtype=dtype) * stride - padding
    offset = offset.reshape(batch, points, 2, out_h, out_w)
    y = offset[:, :, 0] + (kernel_y[:, None] + grid_y)[:, :, None]  # (B, k*k, h, w)
    x_pos = offset[:, :, 1] + (kernel_x[:, None] + grid_x)[:, None, :]

    with torch.no_grad():
        # Far points are clamped just outside: their corners carry no weight anyway, and the
        # integer conversion stays in range however large an offset grows.
        y0 = y.floor().clamp_(-2, height + 1)
        x0 = x_pos.floor().clamp_(-2, width + 1)
        inside_y = torch.stack([(y0 >= 0) & (y0 < height), (y0 >= -1) & (y0 < height - 1)], dim=-1)
        inside_x = torch.stack([(x0 >= 0) & (x0 < width), (x0 >= -1) & (x0 < width - 1)], dim=-1)
        rows = torch.stack([y0, y0 + 1], dim=-1).clamp_(0, height - 1).to(torch.int32)
        columns = torch.stack([x0, x0 + 1], dim=-1).clamp_(0, width - 1).to(torch.int32)
        start = torch.arange(batch, device=device, dtype=torch.int32) * (height * width)
        index = start.view(batch, 1, 1, 1, 1, 1) + (
            rows[..., :, None] * width + columns[..., None, :]
        )  # (B, k*k, h, w, 2, 2)
    frac_y, frac_x = y - y0, x_pos - x0
    weight_y = torch.stack([1 - frac_y, frac_y], dim=-1) * inside_y * mask[..., None]
    weight_x = torch.stack([1 - frac_x, frac_x], dim=-1) * inside_x
    corner_weight = weight_y[..., :, None] * weight_x[..., None, :]

    # One bag of four corners per (image, output position, kernel position).
    order = (0, 2, 3, 1, 4, 5)
    index = index.permute(order).reshape(-1, 4)
    corner_weight = corner_weight.permute(order).reshape(-1, 4)
    table = x.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
    sampled = F.embedding_bag(index, table, mode="sum", per_sample_weights=corner_weight)
    sampled = sampled.view(batch * out_h * out_w, points * channels)
    kernel_matrix = weight.permute(0, 2, 3, 1).reshape(out_channels, points * channels)
    out = linear(sampled, kernel_matrix, bias)  # (B*h*w, O)
    return out.view(batch, out_h, out_w, out_channels).permute(0, 3, 1, 2)


def flat_offset_view(tensor: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The first ``C*height*width`` numbers of each image, read as ``(B, C, height, width)``.

    FIBER's published weights need this. Its dynamic head hands a convolution that works on the
    next coarser level the offsets of the finer level, and the compiled operator reads that memory
    with the coarser level's strides instead of checking the size (specification of the dynamic
    head, "the quirk the weights depend on"). Reading the flattened tensor gives the same numbers,
    and autograd scatters the gradient to the same addresses.

    Args:
        tensor: ``(B, C, H, W)`` with ``H*W >= height*width``; addressed in logical NCHW order.
    """
    batch, channels = tensor.shape[:2]
    needed = channels * height * width
    return tensor.flatten(1)[:, :needed].reshape(batch, channels, height, width)


def resampled_offset_view(tensor: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The geometrically sensible alternative: bilinear resampling to ``(height, width)``.

    Displacements stay in pixels of the map they are applied to.
    """
    return F.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False)
