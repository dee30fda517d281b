"""Sigmoid focal loss (arXiv:1708.02002) over anchor-token pairs.

Shapes: B images, A anchors, T tokens, K boxes of the fullest image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .compiled import is_compiled

# What the compiled operator reads; it computes in float32, or float64 where the logits are.
COMPILED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Logits that the PyTorch path treats at a time: a few caches' worth on CPUs, where that is faster
# than all at once too; on GPUs enough to keep one busy.
PIECE_ON_CPU = 2**18
PIECE_ON_GPU = 2**23


def assigned_token_focal_loss(
    logits: torch.Tensor,
    assigned: torch.Tensor,
    positive_map: torch.Tensor,
    token_mask: torch.Tensor,
    *,
    no_object_column: int | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> torch.Tensor:
    """Sum of the focal loss of anchors against the words of the boxes assigned to them.

    The target of an anchor is a row of its image's positive map, so targets of the logits' size
    are never made, and what is kept for the backward pass is one tensor of that size at most.

    Args:
        logits: ``(B, A, T)``.
        assigned: int64 ``(B, A)``, index of an anchor's box in its image, -1 for none.
        positive_map: ``(B, K, T)``, tokens of each box: bool, or float weights in 0..1. It gets
            no gradient.
        token_mask: bool ``(B, T)``, False where a column is padding and does not count.
        no_object_column: token that anchors without a box are to claim, where there are so many
            columns; None for no such token.
        alpha, gamma: balance and focus of the loss.

    Returns:
        Scalar, float32 (float64 for float64 logits), computed in that whatever the inputs' type.

    On CPUs this is the compiled operator of ``csrc/``. Where that was not built, and on GPUs, it is
    :func:`token_sigmoid_focal_loss`, a piece of the anchors at a time. The results agree;
    ``benchmarks/focal_loss.py`` times both. There is no second derivative.
    """
    column = -1 if no_object_column is None else no_object_column
    arguments = (logits, assigned, positive_map, token_mask, column, alpha, gamma)
    if logits.device.type == "cpu" and logits.dtype in COMPILED_DTYPES and is_compiled():
        return torch.ops.fiber_d2.token_focal_loss(*arguments)
    return _PieceByPiece.apply(*arguments)


class _PieceByPiece(torch.autograd.Function):
    """The loss, and its slope with it, of a few anchors of all images after the other.

    The slope is all that is kept for the backward pass, which takes it times a factor.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        assigned, positive_map, token_mask, column, alpha, gamma = rest
        rows = _rows_of_targets(positive_map, column)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        total = logits.new_zeros((), dtype=dtype)
        wanted = ctx.needs_input_grad[0]
        slope = torch.empty_like(logits, dtype=dtype) if wanted else None
        for piece in _pieces(logits):
            with torch.set_grad_enabled(wanted):
                leaf = logits[:, piece].detach().to(dtype).requires_grad_(wanted)
                targets = _targets(assigned[:, piece], rows)
                loss = token_sigmoid_focal_loss(leaf, targets, token_mask, alpha=alpha, gamma=gamma)
            total += loss.detach()
            if slope is not None:
                slope[:, piece] = torch.autograd.grad(loss, leaf)[0]
        ctx.dtype = logits.dtype
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return ((slope * grad).to(ctx.dtype), *[None] * 6)


def _pieces(logits: torch.Tensor) -> Iterator[slice]:
    batch, anchors, tokens = logits.shape
    piece = PIECE_ON_CPU if logits.device.type == "cpu" else PIECE_ON_GPU
    step = max(1, piece // max(1, batch * tokens))
    for start in range(0, anchors, step):
        yield slice(start, start + step)


def _rows_of_targets(positive_map: torch.Tensor, column: int) -> torch.Tensor:
    """``(B, K + 1, T)``: the map, and a row for the anchors without a box."""
    batch, _, tokens = positive_map.shape
    rows = torch.cat([positive_map, positive_map.new_zeros(batch, 1, tokens)], dim=1)
    if 0 <= column < tokens:
        rows[:, -1, column] = 1
    return rows


def _targets(assigned: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``(B, A, T)`` from ``(B, A)`` and the rows of :func:`_rows_of_targets`."""
    batch, count, tokens = rows.shape
    # -1 is the last row: what is left of a division has the sign of the divisor.
    index = assigned % count + count * torch.arange(batch, device=rows.device)[:, None]
    return rows.flatten(0, 1).index_select(0, index.flatten()).view(*assigned.shape, tokens)


def token_sigmoid_focal_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    token_mask: torch.Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> torch.Tensor:
    """Sum of the focal loss over all anchors and all real tokens.

    Args:
        logits: ``(B, A, T)``.
        targets: ``(B, A, T)`` of 0 and 1; bool, or float, which may then lie in between.
        token_mask: bool ``(B, T)``, False where a column is padding and does not count.

    Returns:
        Scalar, float32 (float64 for float64 logits), computed in that whatever the inputs' type.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    soft = targets.is_floating_point()
    targets = targets.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    # One exponential serves probability and its complement.
    probability = logits.sigmoid()
    if soft:
        error = targets * (1 - probability) + (1 - targets) * probability
        balance = targets * alpha + (1 - targets) * (1 - alpha)
    else:
        error = torch.where(targets > 0, 1 - probability, probability)
        balance = torch.where(targets > 0, alpha, 1 - alpha)
    loss = balance * error**gamma * cross_entropy
    return (loss * token_mask[:, None, :]).sum()
