"""The hooks of a training run, in their order: one place for LazyConfig and CfgNode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from .checkpointer import FiberCheckpointer
from .hooks import CheckpointHook, EvaluationHook, TrainingClock, WritersHook, build_writers


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of a run, as ``configs/common/train.py`` explains them.

    Each field is a key of the LazyConfig node ``train`` and, in upper case, of the CfgNode
    ``cfg.FIBER.TRAIN``; those that Detectron2's own keys say there are looked up in them.
    """

    output_dir: str
    max_iter: int
    eval_period: int = 0
    log_period: int = 20
    checkpointer: Mapping[str, Any] | None = None
    accumulate: int = 1
    max_nonfinite: int = 10

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(
                f"accumulate is {self.accumulate}, but a step needs at least one batch: "
                "give 1 or more."
            )
        if self.max_nonfinite < 1:
            raise ValueError(
                f"max_nonfinite is {self.max_nonfinite}, but it has to be at least 1: 1 stops at "
                "the first loss that is not finite."
            )

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> TrainingOptions:
        """The options in the node ``train`` of a LazyConfig."""
        return cls(**_known(cls, train))

    @classmethod
    def of_cfg_node(cls, cfg: CfgNode) -> TrainingOptions:
        """The options of a CfgNode."""
        given = _known(cls, _plain(cfg.FIBER.TRAIN))
        given["checkpointer"] = {
            "period": cfg.SOLVER.CHECKPOINT_PERIOD,
            **(given.get("checkpointer") or {}),
        }
        return cls(
            output_dir=cfg.OUTPUT_DIR,
            max_iter=cfg.SOLVER.MAX_ITER,
            eval_period=cfg.TEST.EVAL_PERIOD,
            **given,
        )


def _known(cls: type, node: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: node[field.name] for field in fields(cls) if field.name in node}


def _plain(node: CfgNode) -> dict[str, Any]:
    """Keys in lower case; a node with ``ENABLED`` false is None, with true it loses that key."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            inner = _plain(value)
            value = inner if inner.pop("enabled", True) else None
        found[key.lower()] = value
    return found


@dataclass(frozen=True)
class TrainingHooks:
    """What :func:`build_training_hooks` made.

    Attributes:
        clock: of the time spent in steps.
        checkpoint: saves.
        evaluation: evaluates and keeps the last results.
        all: every hook, these included, in the order in which to register them.
    """

    clock: TrainingClock
    checkpoint: CheckpointHook
    evaluation: EvaluationHook
    all: list[HookBase]


def build_training_hooks(
    options: TrainingOptions,
    *,
    model: nn.Module,
    checkpointer: FiberCheckpointer,
    scheduler: Any,
    evaluate: Callable[[], dict[str, Any]],
) -> TrainingHooks:
    """Hooks for a trainer around :class:`~fiber_d2.engine.step.StepTrainer`.

    After each step they act in the order of the list: what changes weights or rates comes first,
    then what saves them, then what evaluates them, then what acts on the results, and the writers
    of curves last.

    Args:
        model: bare, not wrapped for distributed training.
        checkpointer: of the model, with the trainer as a checkpointable.
        scheduler: of the learning rate, as Detectron2's hook takes it; None takes the trainer's.
        evaluate: results as nested dicts of numbers; called in all processes.
    """
    clock = TrainingClock()
    checkpoint = CheckpointHook(checkpointer, **(options.checkpointer or {"period": 5000}))
    evaluation = EvaluationHook(options.eval_period, evaluate)
    found: list[HookBase] = [
        clock,
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=scheduler),
        checkpoint,
        evaluation,
    ]
    if comm.is_main_process():
        found.append(
            WritersHook(
                lambda: build_writers(options.output_dir, options.max_iter), options.log_period
            )
        )
    return TrainingHooks(clock, checkpoint, evaluation, found)
