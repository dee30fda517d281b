"""The hooks of a training run, in their order: one place for LazyConfig and CfgNode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from .best import BestCheckpoint, check_best_options
from .checkpointer import FiberCheckpointer
from .ema import EMA_KEY, EmaHook, ModelEma, build_ema, check_weights, weights_to_evaluate
from .hooks import CheckpointHook, EvaluationHook, TrainingClock, WritersHook
from .preemption import PreemptionHook
from .schedule_hooks import PlateauHook, WeightDecaySchedule, schedule_hook
from .step import StepTrainer
from .training_pictures import TrainingPictures
from .watch import WatchHook
from .writers import TextLog, build_writers, import_wandb


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
    ema: Mapping[str, Any] | None = None
    weights: str = "model"
    weight_decay_schedule: Mapping[str, Any] | None = None
    start_check: bool = True
    picture_period: int = 0
    wandb: Mapping[str, Any] | None = None
    best: Mapping[str, Any] | None = None
    early_stop: Mapping[str, Any] | None = None
    test_best: Sequence[str] = ()

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
        check_weights(self.weights, averaged=self.ema is not None)
        if self.picture_period < 0:
            raise ValueError(
                f"picture_period is {self.picture_period}: give the iterations between two "
                "pictures of training images, or 0 for none."
            )
        if self.wandb is not None:
            import_wandb()
        check_best_options(self.best, self.early_stop, self.test_best)

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> TrainingOptions:
        """The options in the node ``train`` of a LazyConfig."""
        return cls(**_known(cls, train))

    @classmethod
    def of_cfg_node(cls, cfg: CfgNode) -> TrainingOptions:
        """The options of a CfgNode."""
        given = _known(cls, _plain(cfg.FIBER.TRAIN))
        if given.get("weight_decay_schedule") is not None:
            given["weight_decay_schedule"].update(
                milestones=cfg.SOLVER.STEPS, gamma=cfg.SOLVER.GAMMA
            )
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
        best: keeps the best checkpoint and may stop the training; None where nothing asks for it.
        ema: averages the weights; None where nothing asks for it.
        all: every hook, these included, in the order in which to register them.
    """

    clock: TrainingClock
    checkpoint: CheckpointHook
    evaluation: EvaluationHook
    best: BestCheckpoint | None
    ema: ModelEma | None
    all: list[HookBase]


def build_training_hooks(
    options: TrainingOptions,
    *,
    step: StepTrainer,
    model: nn.Module,
    checkpointer: FiberCheckpointer,
    scheduler: Any,
    evaluate: Callable[[], dict[str, Any]],
    tokenizer: str | None = None,
) -> TrainingHooks:
    """Hooks for a trainer around :class:`~fiber_d2.engine.step.StepTrainer`.

    After each step they act in the order of the list: what changes weights or rates comes first,
    then what saves them, then what evaluates them, then what acts on the results, and the writers
    of curves last.

    Args:
        step: what the trainer runs, or the trainer itself.
        model: bare, not wrapped for distributed training.
        checkpointer: of the model, with the trainer as a checkpointable.
        scheduler: of the learning rate, see :func:`~fiber_d2.engine.schedule_hooks.schedule_hook`.
        evaluate: results as nested dicts of numbers; called in all processes.
        tokenizer: name of the one of the training prompts, to write them and to draw training
            images; None does without.
    """
    texts = TextLog()
    clock = TrainingClock()
    checkpoint = CheckpointHook(checkpointer, **(options.checkpointer or {"period": 5000}))
    ema = build_ema(model, options.ema)
    averages = []
    if ema is not None:
        checkpointer.add_checkpointable(EMA_KEY, ema)
        averages.append(EmaHook(ema))
    decays = []
    if options.weight_decay_schedule is not None:
        decays.append(
            WeightDecaySchedule(max_iter=options.max_iter, **options.weight_decay_schedule)
        )

    def evaluate_chosen() -> dict[str, Any]:
        with weights_to_evaluate(options.weights, ema):
            return evaluate()

    evaluation = EvaluationHook(options.eval_period, evaluate_chosen, checkpoint)
    found: list[HookBase] = [
        clock,
        hooks.IterationTimer(),
        WatchHook(step, model, period=options.log_period),
        schedule_hook(scheduler),
        *decays,
        *averages,
        checkpoint,
        PreemptionHook(checkpoint.save_now, evaluation.is_due),
        evaluation,
    ]
    best = _best_checkpoint(options, found, evaluation, checkpointer, checkpoint)
    if best is not None:
        found.append(best)
    if tokenizer:
        found.append(
            TrainingPictures(
                step,
                model,
                tokenizer,
                output_dir=options.output_dir,
                period=options.picture_period,
                texts=texts,
            )
        )
    if comm.is_main_process():
        found.append(
            WritersHook(
                lambda: build_writers(
                    options.output_dir,
                    options.max_iter,
                    window=options.log_period,
                    texts=texts,
                    wandb=options.wandb,
                ),
                options.log_period,
            )
        )
    return TrainingHooks(clock, checkpoint, evaluation, best, ema, found)


def _best_checkpoint(
    options: TrainingOptions,
    found: Sequence[HookBase],
    evaluation: EvaluationHook,
    checkpointer: FiberCheckpointer,
    checkpoint: CheckpointHook,
) -> BestCheckpoint | None:
    plateaus = [hook for hook in found if isinstance(hook, PlateauHook)]
    if options.best is None:
        if plateaus:
            raise ValueError(
                "The learning rate drops when a metric no longer rises: say which one, with "
                "train.best={metric:DATASET/bbox/AP}."
            )
        return None
    mode = options.best.get("mode", "max")
    for hook in plateaus:
        if getattr(hook.scheduler, "mode", mode) != mode:
            raise ValueError(
                f"train.best.mode is {mode!r}, but that of lr_multiplier {hook.scheduler.mode!r}: "
                "both look at the same metric."
            )
    return BestCheckpoint(
        evaluation,
        checkpointer,
        **options.best,
        **(options.early_stop or {}),
        listeners=[hook.observe for hook in plateaus],
        on_stop=checkpoint.save_final,
    )
