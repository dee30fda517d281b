"""Linear layers, on CPUs by the faster of the two libraries that PyTorch comes with.

In float32 PyTorch multiplies matrices by MKL, which keeps its best code for its maker's processors:
on an AMD EPYC oneDNN is more than twice as fast. oneDNN is reached through the operator that
torch.compile uses for linear layers; where that is missing or knows other arguments, and for all
but float32 on CPUs, PyTorch's own does the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

Product = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


@functools.cache
def onednn_product() -> Product | None:
    """``x, weight, bias -> x @ weight.T + bias`` by oneDNN; None where this torch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        product: Product = lambda x, w, b: operator(x, w, b, "none", [], None)  # noqa: E731
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x, w, b = (torch.arange(12.0).view(3, 4), torch.ones(2, 4), torch.ones(2))
            right = torch.equal(product(x, w, b), F.linear(x, w, b))
    except (AttributeError, RuntimeError, TypeError):
        return None  # an operator of another torch: what it is asked is not public
    return product if right else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As ``torch.nn.functional.linear``: ``x`` (..., C), ``weight`` (O, C), ``bias`` (O,) or None
    to (..., O). Where oneDNN does it, gradients cannot be differentiated again."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    ):
        return _Linear.apply(x, weight, bias)
    return onednn_product()(x, weight, bias)


class Linear(nn.Linear):
    """As PyTorch's, by :func:`linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        # Tensors that stand for others (fake ones, of transformations) know torch's operators.
        and type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, nn.Parameter)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
        and onednn_product() is not None
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        for_input, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_input else None)
        return onednn_product()(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        product = onednn_product()
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            None if weight is None else product(grad, weight.t(), None),
            None if x is None else product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )
