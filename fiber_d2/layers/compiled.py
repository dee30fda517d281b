"""The compiled operators of csrc/: whether they are there, and what torch has to know of them.

Importing this module loads ``fiber_d2._C`` where it was built. Nothing needs it: each operator has
a PyTorch path of equal results, which is used where :func:`is_compiled` says no.
"""

from __future__ import annotations

from typing import Any

import torch

BUILD_COMMAND = "python setup.py build_ext --inplace"
OPERATORS = ("deform_conv2d", "token_focal_loss")


def is_compiled() -> bool:
    """Whether the compiled operators can be used in this process."""
    return _REASON is None


def is_bfloat16_fast() -> bool:
    """Whether the compiled deformable convolution gains from bfloat16: only where the processor
    has instructions that multiply it."""
    return _BFLOAT16_IS_FAST


def why_not_compiled() -> str | None:
    """Why the compiled operators cannot be used; None where they can."""
    return _REASON


def _load() -> str | None:
    """Load the extension; the reason where there is none, or none that fits this torch."""
    if not hasattr(torch.library, "register_autograd"):
        return f"they need torch 2.4 or later, and this is torch {torch.__version__}"
    try:
        import fiber_d2._C  # noqa: F401
    except ModuleNotFoundError:
        return f"they were not built: run `{BUILD_COMMAND}` in the checkout, with a C++ compiler"
    except ImportError as error:
        return f"they were built for another torch ({error}): run `{BUILD_COMMAND}` again"
    older = f"they were built from older sources: run `{BUILD_COMMAND}` again"
    if not all(hasattr(torch.ops.fiber_d2, name) for name in OPERATORS):
        return older
    low, high = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 2, 1, 1)
    try:
        torch.ops.fiber_d2.deform_conv2d(low, high, high[:, :1], low, None, 1, 0)
    except (RuntimeError, ValueError):
        return older  # which knew no bfloat16
    return None


def _multiplies_bfloat16() -> bool:
    try:
        # What oneDNN supports may be emulated: AVX-512 alone does not multiply bfloat16.
        instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return bool(instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False  # of another torch: what these are called is not public


def _register_deform_conv() -> None:
    @torch.library.register_fake("fiber_d2::deform_conv2d")
    def shape_of_result(
        x: torch.Tensor,
        offset: torch.Tensor,
        mask: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: int,
        padding: int,
    ) -> torch.Tensor:
        shape = (x.shape[0], weight.shape[0], *offset.shape[2:])
        return offset.new_empty(shape).contiguous(memory_format=torch.channels_last)

    @torch.library.register_fake("fiber_d2::deform_conv2d_backward")
    def shapes_of_gradients(
        grad: torch.Tensor,
        x: torch.Tensor,
        offset: torch.Tensor,
        mask: torch.Tensor,
        weight: torch.Tensor,
        stride: int,
        padding: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            torch.empty_like(x, memory_format=torch.channels_last),
            offset.new_empty(offset.shape),
            mask.new_empty(mask.shape),
            weight.new_empty(weight.shape),
        )

    def remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, offset, mask, weight, bias, ctx.stride, ctx.padding = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, offset, mask, weight)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, offset, mask, weight = ctx.saved_tensors
        given, computed = x.dtype, offset.dtype  # bfloat16 and float32, or twice the same
        x, offset, mask, weight = torch.ops.fiber_d2.deform_conv2d_backward(
            grad, x.to(computed), offset, mask, weight.to(computed), ctx.stride, ctx.padding
        )
        bias = grad.sum(dim=(0, 2, 3)).to(given) if ctx.has_bias else None
        return (x.to(given), offset, mask, weight.to(given), bias, None, None)

    torch.library.register_autograd("fiber_d2::deform_conv2d", backward, setup_context=remember)


def _register_focal_loss() -> None:
    @torch.library.register_fake("fiber_d2::token_focal_loss")
    def scalar_of_result(
        logits: torch.Tensor,
        assigned: torch.Tensor,
        positive_map: torch.Tensor,
        token_mask: torch.Tensor,
        no_object_column: int,
        alpha: float,
        gamma: float,
    ) -> torch.Tensor:
        double = logits.dtype == torch.float64
        return logits.new_empty((), dtype=torch.float64 if double else torch.float32)

    @torch.library.register_fake("fiber_d2::token_focal_loss_backward")
    def shape_of_gradient(
        grad: torch.Tensor,
        logits: torch.Tensor,
        assigned: torch.Tensor,
        positive_map: torch.Tensor,
        token_mask: torch.Tensor,
        no_object_column: int,
        alpha: float,
        gamma: float,
    ) -> torch.Tensor:
        return logits.new_empty(logits.shape)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *tensors, ctx.column, ctx.alpha, ctx.gamma = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits = torch.ops.fiber_d2.token_focal_loss_backward(
            grad, *ctx.saved_tensors, ctx.column, ctx.alpha, ctx.gamma
        )
        return (logits, *[None] * 6)

    torch.library.register_autograd("fiber_d2::token_focal_loss", backward, setup_context=remember)


_REASON = _load()
_BFLOAT16_IS_FAST = _REASON is None and _multiplies_bfloat16()
if _REASON is None:
    _register_deform_conv()
    _register_focal_loss()
