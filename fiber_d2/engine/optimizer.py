"""Parameter groups: which parameter learns at which rate and decays how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from fiber_d2.checkpoint.names import (
    FIBER_TABLE,
    FPN,
    HEAD,
    OUR_ROBERTA,
    OUR_SWIN,
    ROBERTA,
    SWIN,
    NameMap,
)

# Schedules have lived here, too: the saved config.yaml of older runs names them here.
from .schedules import warmup_cosine, warmup_multistep

__all__ = [
    "get_param_groups",
    "original_name",
    "published_param_groups",
    "warmup_cosine",
    "warmup_multistep",
]

NORM_TYPES = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)

_TO_THEIRS = NameMap(FIBER_TABLE).inverse
# Of parameters that the original does not have: the place they would be at.
_PLACES = (
    (OUR_SWIN, SWIN),
    (OUR_ROBERTA, ROBERTA),
    ("backbone.neck.", FPN),
    ("head.", HEAD),
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

    What counts is where a parameter is and what it is; :func:`published_param_groups` goes by
    pieces of names, as the published runs did.

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

    def setting(full_name: str, module: nn.Module) -> tuple[float, float]:
        lr = base_lr
        if _below(full_name, text_prefixes):
            lr *= text_lr_factor
        elif _below(full_name, vision_prefixes):
            lr *= vision_lr_factor
        if full_name.rpartition(".")[2] == "bias":
            return lr * bias_lr_factor, weight_decay_bias
        return lr, weight_decay_norm if isinstance(module, NORM_TYPES) else weight_decay

    return _merge(model, setting)


def published_param_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    text_lr_factor: float = 1.0,
    vision_lr_factor: float = 1.0,
    bias_lr_factor: float = 2.0,
    weight_decay_bias: float = 0.0,
    weight_decay_norm_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` with the settings of the published runs.

    The original looks for pieces of its own names (SPEC_DATA_EVAL 6.1), in this order:

    1. ``language_backbone``: the rate times ``text_lr_factor``.
    2. ``backbone.body``, but not the text tower's: the rate times ``vision_lr_factor``.
    3. ``bias``, anywhere: ``bias_lr_factor`` times the rate so far, and ``weight_decay_bias``. So
       the tables of relative positions and the head's text bias and prior count as biases.
    4. ``norm`` or ``Norm``: the decay so far times ``weight_decay_norm_factor``; the norms of the
       dynamic head are named otherwise.

    Each side of the exchange is part of its tower. Groups and their order are as in
    :func:`get_param_groups`, from which this differs in the bias rule's reach, in the norms of the
    dynamic head, and in the decay of norms by default.

    Args:
        base_lr: of everything not named above.
        weight_decay: of everything but biases.
        text_lr_factor, vision_lr_factor: times ``base_lr`` for the text and the image tower. The
            original names an absolute rate for the text tower, LANG_LR.
        bias_lr_factor: times the tower's rate.

    Raises:
        ValueError: a model without trainable parameters.
    """

    def setting(full_name: str, module: nn.Module) -> tuple[float, float]:
        name = original_name(full_name)
        lr, decay = base_lr, weight_decay
        if "language_backbone" in name:
            lr = base_lr * text_lr_factor
        if "backbone.body" in name and "language_backbone.body" not in name:
            lr = base_lr * vision_lr_factor
        if "bias" in name:
            lr, decay = lr * bias_lr_factor, weight_decay_bias
        if "norm" in name or "Norm" in name:
            decay *= weight_decay_norm_factor
        return lr, decay

    return _merge(model, setting)


def original_name(name: str) -> str:
    """What the original calls the parameter ``name``; for one of its own, what it would begin with.

    Names that belong to none of the model's parts stay as they are.
    """
    known = _TO_THEIRS(name)
    if known is not None:
        return known
    for ours, theirs in _PLACES:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def _merge(
    model: nn.Module, setting: Callable[[str, nn.Module], tuple[float, float]]
) -> list[dict[str, Any]]:
    """Parameters of equal learning rate and weight decay together, in the order of the model."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, module, parameter in _trainable(model):
        groups.setdefault(setting(name, module), []).append(parameter)
    if not groups:
        raise ValueError("The model has no trainable parameter: nothing to optimise.")
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Each trainable parameter once, with its first name and the module it belongs to."""
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield f"{module_name}.{name}" if module_name else name, module, parameter


def _below(name: str, prefixes: Sequence[str]) -> bool:
    return any(name.startswith(prefix + ".") for prefix in prefixes)
