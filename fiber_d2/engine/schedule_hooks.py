"""Hooks that set rates and decays between steps."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler

from .schedules import PlateauSchedule, PlateauScheduler, TorchScheduler, milestone_iterations

logger = logging.getLogger(__name__)


def schedule_hook(scheduler: Any) -> hooks.LRScheduler:
    """The hook that lets the learning rates of the trainer's optimiser follow ``scheduler``.

    Args:
        scheduler: an fvcore ``ParamScheduler``, something of :mod:`fiber_d2.engine.schedules`, or
            a scheduler of the optimiser.

    Raises:
        ValueError: what is given is none of these.
    """
    if isinstance(scheduler, (PlateauSchedule, PlateauScheduler)):
        return PlateauHook(scheduler)
    if isinstance(scheduler, (ParamScheduler, TorchScheduler)):
        return hooks.LRScheduler(scheduler=scheduler)
    if hasattr(scheduler, "attach"):
        return AttachedSchedule(scheduler)
    raise ValueError(
        f"{scheduler!r} is no schedule of learning rates: let lr_multiplier be a node such as "
        "those in configs/common/optim.py."
    )


def attach_schedule(schedule: Any, optimizer: torch.optim.Optimizer, max_iter: int) -> Any:
    """The scheduler of ``optimizer`` that follows ``schedule`` over ``max_iter`` iterations."""
    if isinstance(schedule, ParamScheduler):
        return LRMultiplier(optimizer, schedule, max_iter)
    return schedule.attach(optimizer)


class AttachedSchedule(hooks.LRScheduler):
    """Detectron2's hook for a schedule that sets each group's rate by itself.

    Like one of a common factor it follows from the iteration alone, so it has no state.
    """

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self._schedule = schedule

    def before_train(self) -> None:
        last_iter = self.trainer.iter - 1
        self._scheduler = self._schedule.attach(self.trainer.optimizer, last_iter)
        super().before_train()

    def state_dict(self) -> dict[str, Any]:
        return {}


class PlateauHook(hooks.LRScheduler):
    """Learning rates that drop when what :meth:`observe` is told no longer rises.

    Whoever knows the metric calls it, in all processes and with the same value, after an
    evaluation; see ``listeners`` of :class:`fiber_d2.engine.best.BestCheckpoint`.
    """

    def __init__(self, schedule: PlateauSchedule | PlateauScheduler) -> None:
        super().__init__(scheduler=schedule)
        self._state: dict[str, Any] | None = None

    def before_train(self) -> None:
        if isinstance(self._scheduler, PlateauSchedule):
            last_iter = self.trainer.iter - 1
            self._scheduler = self._scheduler.attach(self.trainer.optimizer, last_iter)
        super().before_train()
        if self._state is not None:
            self._scheduler.load_state_dict(self._state)
            self._state = None

    def observe(self, metric: float | None) -> None:
        """Note the metric of an evaluation."""
        before = [group["lr"] for group in self._optimizer.param_groups]
        self._scheduler.step(metric)
        after = [group["lr"] for group in self._optimizer.param_groups]
        if min(after) < min(before) or max(after) < max(before):
            logger.info(
                "The metric has not improved on %.4f: learning rates drop to at most %.3g",
                self._scheduler.best,
                max(after),
            )

    def state_dict(self) -> dict[str, Any]:
        known = isinstance(self._scheduler, PlateauScheduler)
        return self._scheduler.state_dict() if known else dict(self._state or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = dict(state_dict)


class WeightDecaySchedule(HookBase):
    """Weight decays that fall some time before the learning rates do (SPEC_DATA_EVAL 6.6).

    From iteration ``ratio * m`` on, for each milestone ``m``, all decays are ``gamma`` times what
    they were; in iteration ``i``, counted from 0, so many as there are ``ratio * m <= i``.

    What a group starts from is kept in it as ``initial_weight_decay``, hence in checkpoints.

    Args:
        max_iter: of the run.
        milestones: fractions of ``max_iter`` (below 1) or iterations, those of the learning rate.
        ratio: of the decay's milestones to the learning rate's.
        gamma: factor at each.

    Raises:
        ValueError: milestones out of order, or a ratio that is not positive.
    """

    def __init__(
        self,
        *,
        max_iter: int,
        milestones: Sequence[float] = (0.67, 0.89),
        ratio: float = 0.667,
        gamma: float = 0.1,
    ) -> None:
        if ratio <= 0:
            raise ValueError(f"The ratio of the weight decay's milestones is {ratio}: not above 0.")
        self.thresholds = [step * ratio for step in milestone_iterations(milestones, max_iter)]
        self.gamma = gamma
        self._passed: int | None = None

    def before_train(self) -> None:
        for group in self._groups():
            group.setdefault("initial_weight_decay", group["weight_decay"])
        self._passed = None

    def before_step(self) -> None:
        passed = bisect_right(self.thresholds, self.trainer.iter)
        if passed == self._passed:
            return
        for group in self._groups():
            group["weight_decay"] = group["initial_weight_decay"] * self.gamma**passed
        if passed:
            logger.info(
                "From iteration %d on weight decays are %.3g times the initial ones",
                self.trainer.iter,
                self.gamma**passed,
            )
        self._passed = passed

    def _groups(self) -> list[dict[str, Any]]:
        optimizer: torch.optim.Optimizer = self.trainer.optimizer
        return optimizer.param_groups
