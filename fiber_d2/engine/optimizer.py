"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn

NORM_TYPES = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def get_param_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    text_lr_factor: float = 1.0,
    vision_lr_factor: float = 1.0,
    bias_lr_factor: float = 1.0,
    weight_decay_norm: float | None = None,
    weight_decay_bias: float | None = None,
    text_prefixes: Sequence[str] = ("backbone.text",),
    vision_prefixes: Sequence[str] = ("backbone.swin",),
) -> list[dict[str, Any]]:
    """The trainable parameters of ``model``, in as few groups as their settings allow.

    Few groups let the optimiser treat many tensors at once; the order of groups and of parameters
    follows the model alone, so that a saved optimiser state fits again.

    Args:
        base_lr: learning rate of everything not named below.
        weight_decay: of everything but norms and biases.
        text_lr_factor, vision_lr_factor: times ``base_lr`` for the text and the image tower.
        bias_lr_factor: times the tower's rate, for parameters called ``bias``.
        weight_decay_norm, weight_decay_bias: None means ``weight_decay``. A bias of a norm counts
            as a bias.
        text_prefixes, vision_prefixes: how the names of the towers' parameters begin.

    Raises:
        ValueError: a model without trainable parameters.
    """
    weight_decay_norm = weight_decay if weight_decay_norm is None else weight_decay_norm
    weight_decay_bias = weight_decay if weight_decay_bias is None else weight_decay_bias
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            full_name = f"{module_name}.{name}" if module_name else name
            lr, decay = base_lr, weight_decay
            if _below(full_name, text_prefixes):
                lr *= text_lr_factor
            elif _below(full_name, vision_prefixes):
                lr *= vision_lr_factor
            if name == "bias":
                lr, decay = lr * bias_lr_factor, weight_decay_bias
            elif isinstance(module, NORM_TYPES):
                decay = weight_decay_norm
            groups.setdefault((lr, decay), []).append(parameter)
    if not groups:
        raise ValueError("The model has no trainable parameter: nothing to optimise.")
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def _below(name: str, prefixes: Sequence[str]) -> bool:
    return any(name.startswith(prefix + ".") for prefix in prefixes)


def warmup_cosine(
    *,
    max_iter: int,
    warmup_iters: int = 0,
    warmup_factor: float = 1e-3,
    end_factor: float = 0.0,
) -> ParamScheduler:
    """Factor of the learning rate: a linear rise, then a cosine from 1 down to ``end_factor``.

    The cosine spans the whole run, the rise included, so it ends with the last iteration.
    """
    scheduler = CosineParamScheduler(1.0, end_factor)
    return _with_warmup(scheduler, max_iter, warmup_iters, warmup_factor)


def warmup_multistep(
    *,
    max_iter: int,
    warmup_iters: int = 0,
    warmup_factor: float = 1e-3,
    milestones: Sequence[float] = (0.67, 0.89),
    gamma: float = 0.1,
) -> ParamScheduler:
    """Factor of the learning rate: a linear rise, then times ``gamma`` at each milestone.

    ``milestones`` are fractions of ``max_iter``, each strictly between 0 and 1, in rising order.
    """
    steps = [round(max_iter * fraction) for fraction in milestones]
    scheduler = MultiStepParamScheduler(
        values=[gamma**k for k in range(len(steps) + 1)], milestones=steps, num_updates=max_iter
    )
    return _with_warmup(scheduler, max_iter, warmup_iters, warmup_factor)


def _with_warmup(
    scheduler: ParamScheduler, max_iter: int, warmup_iters: int, warmup_factor: float
) -> ParamScheduler:
    if max_iter < 1 or warmup_iters < 0:
        raise ValueError(
            f"A schedule of {max_iter} iterations with {warmup_iters} of warm-up is not possible."
        )
    if warmup_iters == 0:
        return scheduler
    return WarmupParamScheduler(scheduler, warmup_factor, min(warmup_iters / max_iter, 1.0))
