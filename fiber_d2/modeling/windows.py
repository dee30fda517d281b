"""Attention within (shifted) windows of a token map.

The model specification, section 2.

Letters: B maps of H x W tokens, both multiples of the window; R x S windows of N tokens; h heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def window_partition(x: torch.Tensor, window: int) -> torch.Tensor:
    """``(B, H, W, C)`` to ``(B, R, S, N, C)``."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, R, side, S, side, C)
    return x.transpose(2, 3).flatten(3, 4)


def window_reverse(x: torch.Tensor, window: int) -> torch.Tensor:
    """Inverse of :func:`window_partition`."""
    x = x.unflatten(3, (window, window)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def to_windows(x: torch.Tensor, window: int, shift: int) -> torch.Tensor:
    """``(B, H, W, C)`` of any H and W to ``(B, R, S, N, C)``, padded with zeros and shifted.

    Padding takes part in the attention: it is not masked.

    Args:
        window: side in tokens.
        shift: by which the map is rolled up and left, 0 for none.
    """
    if _is_one_operator():
        return torch.ops.fiber_d2.to_windows(x, window, shift)
    return _to_windows(x, window, shift)


def from_windows(x: torch.Tensor, window: int, shift: int, height: int, width: int) -> torch.Tensor:
    """Inverse of :func:`to_windows`, without the padding: contiguous ``(B, height, width, C)``."""
    if _is_one_operator():
        return torch.ops.fiber_d2.from_windows(x, window, shift, height, width)
    return _from_windows(x, window, shift, height, width)


def _is_one_operator() -> bool:
    """Whether torch.compile is at work, which has to think for minutes about what a shift, windows
    and sizes that may vary make of an index; not for exported programs, which have to do without
    the operators."""
    return (
        _HAS_OPERATORS
        and torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
    )


def _to_windows(x: torch.Tensor, window: int, shift: int) -> torch.Tensor:
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    if shift:
        x = torch.roll(x, (-shift, -shift), dims=(1, 2))
    return window_partition(x, window)


def _from_windows(
    x: torch.Tensor, window: int, shift: int, height: int, width: int
) -> torch.Tensor:
    x = window_reverse(x, window)
    if shift:
        x = torch.roll(x, (shift, shift), dims=(1, 2))
    x = x[:, :height, :width]
    # Of a view that is not contiguous torch would make one matrix product or several, as weights
    # learn or not. Whether there was padding must not be a condition of a graph for all sizes.
    return _clone(x) if torch.compiler.is_compiling() else x.contiguous()


def _clone(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# torch before 2.7 does not tell whether it exports, and then compiles the parts one by one.
_HAS_OPERATORS = hasattr(torch.library, "custom_op") and hasattr(torch.compiler, "is_exporting")

if _HAS_OPERATORS:

    def _unshared(found: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Contiguous; what an operator returns may not be a view of what it was given."""
        if found.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
            return _clone(found)
        return found.contiguous()

    @torch.library.custom_op("fiber_d2::to_windows", mutates_args=())
    def _to_windows_operator(x: torch.Tensor, window: int, shift: int) -> torch.Tensor:
        return _unshared(_to_windows(x, window, shift), x)

    @torch.library.custom_op("fiber_d2::from_windows", mutates_args=())
    def _from_windows_operator(
        x: torch.Tensor, window: int, shift: int, height: int, width: int
    ) -> torch.Tensor:
        return _unshared(_from_windows(x, window, shift, height, width), x)

    @_to_windows_operator.register_fake
    def _(x: torch.Tensor, window: int, shift: int) -> torch.Tensor:
        batch, height, width, dim = x.shape
        grid = (height + window - 1) // window, (width + window - 1) // window
        return x.new_empty(batch, *grid, window * window, dim)

    @_from_windows_operator.register_fake
    def _(x: torch.Tensor, window: int, shift: int, height: int, width: int) -> torch.Tensor:
        return x.new_empty(x.shape[0], height, width, x.shape[-1])

    # Each one puts tokens into other places, and zeros elsewhere: its gradient is the other one.

    def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, *ctx.numbers = inputs
        ctx.size = x.shape[1:3]

    def _to_windows_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return _from_windows_operator(gradient, *ctx.numbers, *ctx.size), None, None

    def _from_windows_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        window, shift, *_ = ctx.numbers
        return _to_windows_operator(gradient, window, shift), None, None, None, None

    _to_windows_operator.register_autograd(_to_windows_backward, setup_context=_remember)
    _from_windows_operator.register_autograd(_from_windows_backward, setup_context=_remember)


def shift_regions(
    rows: int, columns: int, window: int, shift: int, device: torch.device
) -> torch.Tensor:
    """Which region each token of a shifted map came from, as numbers ``(R, S, N)``.

    Tokens of different regions are neighbours only by the shift. That is so in the last row and
    the last column of windows, also where there is a single one, as in the original.
    """

    def parts(windows: int) -> torch.Tensor:
        size = windows * window
        position = torch.arange(size, device=device)
        return (position >= size - window).int() + (position >= size - shift).int()

    label = parts(rows)[:, None] * 3 + parts(columns)[None, :]
    return window_partition(label[None, :, :, None], window)[0, ..., 0]


def window_attention(
    qkv: torch.Tensor, bias: torch.Tensor, regions: torch.Tensor | None
) -> torch.Tensor:
    """Softmax of scaled products, position bias and -100 between regions, times the values.

    Args:
        qkv: ``(B, R, S, N, 3, h, C/h)``.
        bias: ``(h, N, N)``, added to the scores of every window.
        regions: of :func:`shift_regions`, None for maps that are not shifted.

    Returns:
        ``(B, R, S, N, C)``.
    """
    grid = qkv.shape[1:3]
    if bias.requires_grad and qkv.device.type == "cpu":
        # Torch's fused kernel gives no gradient of the bias on CPUs; what it does instead takes
        # longer than this.
        return _written_out(qkv.flatten(1, 2), bias, regions).unflatten(1, grid)
    if regions is None:
        return _fused(qkv.flatten(1, 2), bias[None]).unflatten(1, grid)
    # A bias for each window would be as large as the scores: only the edge gets one.
    edge_bias = bias + _mask(_split_edge(regions[None])[1][0])[:, None]
    edge_bias = edge_bias.expand(len(qkv), -1, -1, -1, -1).flatten(0, 1)
    if 1 in grid:
        return _fused(qkv.flatten(1, 2), edge_bias).unflatten(1, grid)
    inner, edge = _split_edge(qkv)
    return _join_edge(_fused(inner, bias[None]), _fused(edge, edge_bias), grid)


def _mask(regions: torch.Tensor) -> torch.Tensor:
    """``(windows, N)`` to what is added to the scores, ``(windows, N, N)``."""
    return (regions[:, :, None] != regions[:, None, :]).float() * -100.0


def _fused(qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``qkv`` (B, windows, N, 3, h, C/h), ``bias`` (1 or B * windows, h, N, N) to
    (B, windows, N, C)."""
    query, key, value = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4)  # each (B * windows, h, N, C/h)
    # Autocast would round the bias; the kernels for CPUs take it as it is.
    if query.device.type != "cpu":
        bias = bias.to(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attended.transpose(1, 2).flatten(2).unflatten(0, qkv.shape[:2])


def _written_out(
    qkv: torch.Tensor, bias: torch.Tensor, regions: torch.Tensor | None
) -> torch.Tensor:
    """The same from ``bias`` (h, N, N) and ``regions`` (R, S, N), with a gradient of the bias."""
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, h, N, C/h)
    scores = ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).float()
    scores += bias
    if regions is not None:
        scores += _mask(regions.flatten(0, 1))[:, None]
    attended = scores.softmax(dim=-1).to(value.dtype) @ value
    return attended.transpose(2, 3).flatten(3)


def _split_edge(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, R, S, ...)`` to all but the last row and column, ``(B, (R - 1) * (S - 1), ...)``, and
    the rest, ``(B, R + S - 1, ...)``."""
    return x[:, :-1, :-1].flatten(1, 2), torch.cat([x[:, :-1, -1], x[:, -1]], dim=1)


def _join_edge(inner: torch.Tensor, edge: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """Inverse of :func:`_split_edge`."""
    rows, columns = grid
    right, bottom = edge.split([rows - 1, columns], dim=1)
    inner = inner.unflatten(1, (rows - 1, columns - 1))
    upper = torch.cat([inner, right[:, :, None]], dim=2)
    return torch.cat([upper, bottom[:, None]], dim=1)
