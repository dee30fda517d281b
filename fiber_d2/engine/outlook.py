"""Learning rates in words: which parameters have which, and how they change over the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from fiber_d2.checkpoint.names import OUR_ROBERTA, OUR_SWIN

# Beginnings of parameter names and what they are called; all other parameters are the head's.
_TOWERS = {OUR_ROBERTA: "text", OUR_SWIN: "image"}
_HEAD = "head"
# Points at which a schedule is looked at before the places of its changes are searched for.
_SAMPLES = 1000
# Relative change from one iteration to the next that is a step and no slope.
_STEP = 0.01
_TOLERANCE = 1e-9


def rate_kinds(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The kinds of parameters that have a learning rate of their own.

    Returns:
        For each kind, such as "text" or "image+head_bias", the number of a parameter group that
        has its rate; in the order of the groups.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_rate: dict[float, list[int]] = {}
    for number, group in enumerate(optimizer.param_groups):
        by_rate.setdefault(group.get("initial_lr", group["lr"]), []).append(number)
    kinds: dict[str, int] = {}
    for numbers in by_rate.values():
        own = [names.get(p, "") for i in numbers for p in optimizer.param_groups[i]["params"]]
        kind = _kind(own)
        kinds[kind if kind not in kinds else f"{kind}_{numbers[0]}"] = numbers[0]
    return kinds


def _kind(names: list[str]) -> str:
    parts = {
        next((called for begin, called in _TOWERS.items() if name.startswith(begin)), _HEAD)
        for name in names
    }
    everything = [*_TOWERS.values(), _HEAD]
    kind = "+".join(part for part in everything if part in parts)
    kind = "all" if len(parts) == len(everything) else kind
    return f"{kind}_bias" if all("bias" in name for name in names) else kind


def describe_rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The rates before the schedule's factors: "image+head 0.0001, text 1e-05"."""
    groups = optimizer.param_groups
    return ", ".join(
        f"{kind} {groups[number].get('initial_lr', groups[number]['lr']):.3g}"
        for kind, number in rate_kinds(model, optimizer).items()
    )


def describe_schedule(scheduler: Any, max_iter: int) -> str:
    """A learning-rate schedule in words: "warm-up of 2000 iterations from x0.001; x0.1 at 60300".

    Args:
        scheduler: a function of the fraction that is done (0..1) to a factor, or Detectron2's
            LRMultiplier of one. Anything else is described by its own ``describe()`` where it has
            one, or by the name of its class.
        max_iter: iterations of the whole training.
    """
    if isinstance(scheduler, LRMultiplier):
        scheduler = scheduler._multiplier  # Detectron2 has no other way to ask
    if hasattr(scheduler, "describe"):
        return scheduler.describe()
    if not isinstance(scheduler, ParamScheduler):
        return type(scheduler).__name__
    found = _Schedule(lambda iteration: float(scheduler(iteration / max_iter)), max_iter - 1)
    begin, last = found.end_of_rise(), found.last
    steps = found.steps(begin)
    first, final = found.factor(begin), found.factor(last)
    parts = [f"warm-up of {begin} iterations from x{found.factor(0):.3g}"] if begin else []
    parts += [f"x{found.factor(i) / found.factor(i - 1):.3g} at {i}" for i in steps]
    if not steps:
        constant = abs(final - first) <= _TOLERANCE
        parts.append("constant" if constant else f"smoothly from x{first:.3g} to x{final:.3g}")
    return "; ".join(parts)


class _Schedule:
    """A function of iterations, looked at in few of them."""

    def __init__(self, factor: Callable[[int], float], last: int) -> None:
        self.factor = factor
        self.last = last
        self._points = np.unique(np.linspace(0, last, min(_SAMPLES, last + 1)).astype(int)).tolist()

    def end_of_rise(self) -> int:
        """The iteration at which a rise at the beginning is over; 0 where there is none."""
        if not self._grows(0):
            return 0
        high = next((i for i in self._points if not self._grows(i)), self.last)
        return _first(0, high, lambda i: not self._grows(i))

    def steps(self, begin: int) -> list[int]:
        """The iterations from ``begin`` on with another factor than before, flat on both sides."""
        points = [begin, *(i for i in self._points if i > begin)]
        found = []
        for low, high in zip(points, points[1:]):
            while self._differ(low, high):
                low = _first(low + 1, high, lambda i, low=low: self._differ(low, i))
                if not self._is_step(low, begin):
                    break  # a slope, every iteration of it another value
                found.append(low)
        return found

    def _is_step(self, i: int, begin: int) -> bool:
        flat_before = i - 2 < begin or not self._differ(i - 2, i - 1)
        flat_behind = i == self.last or not self._differ(i, i + 1)
        before = self.factor(i - 1)
        return flat_before and flat_behind and abs(self.factor(i) - before) > _STEP * abs(before)

    def _grows(self, i: int) -> bool:
        return i < self.last and self.factor(i + 1) - self.factor(i) > _TOLERANCE

    def _differ(self, i: int, j: int) -> bool:
        return abs(self.factor(i) - self.factor(j)) > _TOLERANCE


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first of ``low .. high`` for which it holds, by bisection; ``high`` where none does."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
