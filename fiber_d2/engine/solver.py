"""Optimisation as the CfgNode keys under ``SOLVER`` and ``FIBER.TRAIN`` ask for it."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler
from torch import nn

from .optimizer import get_param_groups, published_param_groups
from .schedule_hooks import attach_schedule
from .schedules import PlateauSchedule, PublishedCosine, warmup_cosine, warmup_multistep

SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "PublishedCosineLR", "PlateauLR")


def build_param_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups by the rules that ``FIBER.TRAIN.PARAM_GROUPS.RULES`` names.

    Raises:
        ValueError: unknown rules, or a model without trainable parameters.
    """
    solver, settings = cfg.SOLVER, cfg.FIBER.TRAIN.PARAM_GROUPS
    shared = {
        "base_lr": solver.BASE_LR,
        "weight_decay": solver.WEIGHT_DECAY,
        "text_lr_factor": settings.TEXT_LR_FACTOR,
        "vision_lr_factor": settings.VISION_LR_FACTOR,
        "bias_lr_factor": solver.BIAS_LR_FACTOR,
        "weight_decay_bias": solver.WEIGHT_DECAY_BIAS,
    }
    if settings.RULES == "by_kind":
        return get_param_groups(model, weight_decay_norm=solver.WEIGHT_DECAY_NORM, **shared)
    if settings.RULES != "published":
        raise ValueError(
            f"FIBER.TRAIN.PARAM_GROUPS.RULES is {settings.RULES!r}: choose published or by_kind."
        )
    if shared["weight_decay_bias"] is None:
        shared["weight_decay_bias"] = solver.WEIGHT_DECAY
    factor = settings.WEIGHT_DECAY_NORM_FACTOR
    return published_param_groups(model, weight_decay_norm_factor=factor, **shared)


def build_schedule(cfg: CfgNode) -> Any:
    """The schedule that ``SOLVER.LR_SCHEDULER_NAME`` names, one of :data:`SCHEDULERS`.

    ``SOLVER.STEPS`` may be iterations, as Detectron2 has them, or fractions of the run below 1.

    Raises:
        ValueError: an unknown name, or numbers that make no schedule.
    """
    solver, plateau = cfg.SOLVER, cfg.FIBER.TRAIN.PLATEAU
    warmup = {"warmup_iters": solver.WARMUP_ITERS, "warmup_factor": solver.WARMUP_FACTOR}
    name = solver.LR_SCHEDULER_NAME
    if name not in SCHEDULERS:
        raise ValueError(f"SOLVER.LR_SCHEDULER_NAME is {name!r}: choose {', '.join(SCHEDULERS)}.")
    if name == "PlateauLR":
        best = cfg.FIBER.TRAIN.BEST
        return PlateauSchedule(
            gamma=solver.GAMMA,
            patience=plateau.PATIENCE,
            threshold=plateau.THRESHOLD,
            min_lr=plateau.MIN_LR,
            mode=best.MODE,
            **warmup,
        )
    warmup["max_iter"] = solver.MAX_ITER
    if name == "PublishedCosineLR":
        return PublishedCosine(min_lr=plateau.MIN_LR, **warmup)
    if name == "WarmupCosineLR":
        return warmup_cosine(**warmup)
    return warmup_multistep(milestones=solver.STEPS, gamma=solver.GAMMA, **warmup)


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
    """A scheduler of ``optimizer`` that follows :func:`build_schedule`.

    Where ``SOLVER.WARMUP_METHOD`` is another than "linear" it is Detectron2's own.
    """
    if cfg.SOLVER.WARMUP_METHOD != "linear":
        return build_lr_scheduler(cfg, optimizer)
    return attach_schedule(build_schedule(cfg), optimizer, cfg.SOLVER.MAX_ITER)
