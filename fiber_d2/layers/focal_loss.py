"""Sigmoid focal loss (arXiv:1708.02002) over anchor-token pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
        float32 scalar. Computed in float32 whatever the inputs' type.
    """
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
