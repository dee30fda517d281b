"""Activation checkpointing (arXiv:1604.06174): memory for time in training."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch.utils.checkpoint import checkpoint


def call_block(block: Callable[..., Any], *inputs: Any, recompute: bool) -> Any:
    """``block(*inputs)``; with ``recompute`` its activations are not kept for the backward pass.

    Only the inputs are, and the backward pass runs the block again. The second run draws the same
    random numbers (dropout, drop path) and is under the same autocast, so losses and gradients are
    those without. Where no gradient is asked for, there is nothing to keep and nothing changes.

    Args:
        block: a module or function without side effects.
        inputs: tensors or None; tensors inside of other objects would not be found.
        recompute: whether to.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
