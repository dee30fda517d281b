"""Learning rates over a run: steps, cosines, and drops when a metric has stopped rising.

A schedule is either a factor of every group's rate (an fvcore ``ParamScheduler``) or, where groups
are not scaled alike, an object whose ``attach`` makes a scheduler of an optimiser. Warm-up is
counted in iterations: in iteration ``i`` of ``w`` the factor is ``f * (1 - i / w) + i / w``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, ParamScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

# Detectron2's hook keeps the state of schedulers of this class only.
TorchScheduler = torch.optim.lr_scheduler._LRScheduler


def milestone_iterations(milestones: Sequence[float], max_iter: int) -> list[int]:
    """Milestones below 1 as iterations, rounded to the nearest (a half to the even one).

    Args:
        milestones: fractions of ``max_iter`` (below 1) or iterations, in rising order.

    Raises:
        ValueError: negative or falling milestones.
    """
    steps = [round(max_iter * m) if m < 1 else int(m) for m in milestones]
    if any(m < 0 for m in milestones) or steps != sorted(steps):
        raise ValueError(
            f"The milestones {list(milestones)} are not in rising order from 0 on: give fractions "
            "of the run (below 1) or iterations."
        )
    return steps


def warmup_factor_at(iteration: int, warmup_iters: int, warmup_factor: float) -> float:
    """The rise from ``warmup_factor`` in iteration 0 to 1 in iteration ``warmup_iters``."""
    if iteration >= warmup_iters:
        return 1.0
    progress = iteration / warmup_iters
    return warmup_factor * (1 - progress) + progress


class WarmupMultiStep(ParamScheduler):
    """Factor ``gamma ** k`` after ``k`` milestones, times the warm-up's.

    Milestones may lie in the warm-up (which a run shorter than it has), or beyond the run.
    """

    def __init__(
        self,
        *,
        max_iter: int,
        milestones: Sequence[float],
        gamma: float,
        warmup_iters: int,
        warmup_factor: float,
    ) -> None:
        _check_lengths(max_iter, warmup_iters)
        self.max_iter = max_iter
        self.milestones = milestone_iterations(milestones, max_iter)
        self.gamma = gamma
        self.warmup_iters = warmup_iters
        self.warmup_factor = warmup_factor

    def factor(self, iteration: int) -> float:
        """Of the rate that iteration ``iteration``, counted from 0, is made with."""
        decayed = self.gamma ** bisect_right(self.milestones, iteration)
        return decayed * warmup_factor_at(iteration, self.warmup_iters, self.warmup_factor)

    def __call__(self, where: float) -> float:
        # Detectron2 hands over iteration / max_iter; the product is off by rounding only.
        return self.factor(round(where * self.max_iter))


def warmup_multistep(
    *,
    max_iter: int,
    warmup_iters: int = 0,
    warmup_factor: float = 1e-3,
    milestones: Sequence[float] = (0.67, 0.89),
    gamma: float = 0.1,
) -> WarmupMultiStep:
    """Factor of the learning rate: a linear rise, then times ``gamma`` at each milestone.

    This is the published schedule (SPEC_DATA_EVAL 6.4), iteration by iteration.

    Args:
        milestones: fractions of ``max_iter`` (below 1) or iterations, in rising order.

    Raises:
        ValueError: a run without iterations, negative warm-up, milestones out of order.
    """
    return WarmupMultiStep(
        max_iter=max_iter,
        milestones=milestones,
        gamma=gamma,
        warmup_iters=warmup_iters,
        warmup_factor=warmup_factor,
    )


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
    _check_lengths(max_iter, warmup_iters)
    scheduler = CosineParamScheduler(1.0, end_factor)
    if warmup_iters == 0:
        return scheduler
    return WarmupParamScheduler(scheduler, warmup_factor, min(warmup_iters / max_iter, 1.0))


class PublishedCosine:
    """The original's cosine (SPEC_DATA_EVAL 6.5): starts after the warm-up, stops above its floor.

    After the warm-up ``w`` of ``n`` iterations a group of rate ``r`` has the rate
    ``min_lr + (r - min_lr) * (1 + cos(pi * (i - w) / n)) / 2``. At the end of the run the argument
    is ``pi * (n - w) / n``, so with a warm-up the floor is not reached; :func:`warmup_cosine` does
    reach its end.
    """

    def __init__(
        self,
        *,
        max_iter: int,
        warmup_iters: int = 0,
        warmup_factor: float = 1e-3,
        min_lr: float = 1e-6,
    ) -> None:
        _check_lengths(max_iter, warmup_iters)
        self.max_iter = max_iter
        self.warmup_iters = warmup_iters
        self.warmup_factor = warmup_factor
        self.min_lr = min_lr

    def lr(self, base_lr: float, iteration: int) -> float:
        """The rate in iteration ``iteration`` of a group that starts from ``base_lr``."""
        if iteration < self.warmup_iters:
            return base_lr * warmup_factor_at(iteration, self.warmup_iters, self.warmup_factor)
        angle = math.pi * (iteration - self.warmup_iters) / self.max_iter
        return self.min_lr + (base_lr - self.min_lr) * (1 + math.cos(angle)) / 2

    def describe(self) -> str:
        """The schedule in words."""
        text = f"cosine over {self.max_iter} iterations towards {self.min_lr:g}"
        return _after_warmup(text, self.warmup_iters, self.warmup_factor)

    def attach(self, optimizer: torch.optim.Optimizer, last_iter: int = -1) -> TorchScheduler:
        """A scheduler of ``optimizer``, to be stepped after every iteration.

        Args:
            last_iter: the iteration done last, or -1.
        """
        return _PublishedCosineLR(optimizer, self, last_iter)


class _PublishedCosineLR(TorchScheduler):
    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: PublishedCosine, last_iter: int
    ) -> None:
        self._schedule = schedule
        super().__init__(optimizer, last_epoch=last_iter)

    def get_lr(self) -> list[float]:
        return [self._schedule.lr(base_lr, self.last_epoch) for base_lr in self.base_lrs]

    def describe(self) -> str:
        """The schedule in words."""
        return self._schedule.describe()

    def state_dict(self) -> dict[str, Any]:
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}


class PlateauSchedule:
    """Rates that drop when a metric has not risen for some evaluations (SPEC_DATA_EVAL 6.11).

    Args:
        gamma: a drop's factor.
        patience: evaluations without a rise that are let pass; the next one drops.
        threshold: smallest rise that counts, relative to the best value so far.
        min_lr: no group falls below it.
        mode: "max" where larger is better, "min" for errors.
        warmup_iters, warmup_factor: of the rise before it; evaluations within it are not judged.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.1,
        patience: int = 3,
        threshold: float = 1e-4,
        min_lr: float = 1e-6,
        mode: str = "max",
        warmup_iters: int = 0,
        warmup_factor: float = 1e-3,
    ) -> None:
        if not 0 < gamma < 1:
            raise ValueError(f"The drop's factor gamma is {gamma}: it has to be between 0 and 1.")
        if patience < 0 or warmup_iters < 0:
            raise ValueError(
                f"patience {patience} and warmup_iters {warmup_iters} cannot be negative."
            )
        if mode not in ("max", "min"):
            raise ValueError(f'mode {mode!r} is not known: choose "max" or "min".')
        self.gamma = gamma
        self.patience = patience
        self.threshold = threshold
        self.min_lr = min_lr
        self.mode = mode
        self.warmup_iters = warmup_iters
        self.warmup_factor = warmup_factor

    def describe(self) -> str:
        """The schedule in words."""
        text = (
            f"x{self.gamma:g} after {self.patience + 1} evaluations in a row without a new best, "
            f"down to {self.min_lr:g}"
        )
        return _after_warmup(text, self.warmup_iters, self.warmup_factor)

    def attach(self, optimizer: torch.optim.Optimizer, last_iter: int = -1) -> PlateauScheduler:
        """A scheduler of ``optimizer``; see :meth:`PlateauScheduler.step`."""
        return PlateauScheduler(optimizer, self, last_iter)


class PlateauScheduler:
    """What a :class:`PlateauSchedule` makes of an optimiser.

    While the warm-up lasts every call of :meth:`step`, one with a metric too, advances it by one:
    before call ``n`` (counted from 0) the factor is that of iteration ``max(n - 1, 0)``, after the
    last call of the warm-up it is 1. The original makes its very first iteration at the full rate;
    here it has the warm-up's first rate.

    Args:
        last_iter: the iteration done last, or -1. Where one is done, rates stay as they are.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: PlateauSchedule, last_iter: int = -1
    ) -> None:
        self.schedule = schedule
        self.optimizer = optimizer
        self.base_lrs = [
            float(group.setdefault("initial_lr", group["lr"])) for group in optimizer.param_groups
        ]
        self.warmup_calls = min(last_iter + 1, schedule.warmup_iters)
        self._plateau = ReduceLROnPlateau(
            optimizer,
            mode=schedule.mode,
            factor=schedule.gamma,
            patience=schedule.patience,
            threshold=schedule.threshold,
            min_lr=schedule.min_lr,
        )
        if last_iter < 0 and schedule.warmup_iters:
            self._set_warmup_lr()

    @property
    def mode(self) -> str:
        """Whether the metric is to rise ("max") or to fall ("min")."""
        return self.schedule.mode

    def describe(self) -> str:
        """The schedule in words."""
        return self.schedule.describe()

    @property
    def best(self) -> float:
        """The best metric so far; infinite before the first."""
        return float(self._plateau.best)

    def step(self, metric: float | None = None) -> None:
        """To be called after every iteration without a metric, and with one after an evaluation.

        A metric of None, 0 or NaN says nothing (an evaluation of nothing, say) and is ignored.
        """
        if self.warmup_calls < self.schedule.warmup_iters:
            self.warmup_calls += 1
            self._set_warmup_lr()
        elif metric and not math.isnan(metric):
            self._plateau.step(metric)

    def _set_warmup_lr(self) -> None:
        length, done = self.schedule.warmup_iters, self.warmup_calls
        iteration = length if done == length else max(done - 1, 0)
        factor = warmup_factor_at(iteration, length, self.schedule.warmup_factor)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base_lr * factor

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the present rates are in the optimiser's state."""
        return {
            "base_lrs": self.base_lrs,
            "warmup_calls": self.warmup_calls,
            "best": self.best,
            "num_bad": self._plateau.num_bad_epochs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_lrs = list(state_dict["base_lrs"])
        self.warmup_calls = state_dict["warmup_calls"]
        self._plateau.best = state_dict["best"]
        self._plateau.num_bad_epochs = state_dict["num_bad"]


def _after_warmup(text: str, warmup_iters: int, warmup_factor: float) -> str:
    if not warmup_iters:
        return text
    return f"warm-up of {warmup_iters} iterations from x{warmup_factor:g}; {text}"


def _check_lengths(max_iter: int, warmup_iters: int) -> None:
    if max_iter < 1 or warmup_iters < 0:
        raise ValueError(
            f"A schedule of {max_iter} iterations with {warmup_iters} of warm-up is not possible."
        )
