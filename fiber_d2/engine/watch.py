"""Watching a training: how fast it is, what it waits for, how much memory it takes."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from .memory import GIB, peak_process_bytes
from .outlook import rate_kinds

logger = logging.getLogger(__name__)

# Share of the time from which on waiting for data is worth a word.
MAX_DATA_SHARE = 0.3
# Iterations that the share is taken over.
DATA_WINDOW = 100
# Iterations at the beginning that do not count: workers start, caches fill.
WARM_UP = 10
# Iterations from one warning to the next.
REPEAT_AFTER = 5000


class WatchHook(HookBase):
    """Records throughput, waiting times, memory and learning rates once per log period.

    ===================== ======================================================================
    ``images_per_second`` of all processes, over the steps of the period (evaluation left out)
    ``data_time_share``   of the steps' time, what the slowest process waited for its images
    ``host_memory_gib``   the most that the first process has held at once, workers left out
    ``gpu_memory_gib``    the same on its GPU, as tensors of torch
    ``lr/<kind>``         where parameters have different learning rates, those of each kind
    ===================== ======================================================================

    A warning says so when waiting for data takes more than ``max_data_share`` of
    ``data_window`` iterations; it is repeated every 5000 iterations at most.

    Times are the host's. They are right for a whole period, at whose end the losses are fetched
    from the device. Register it before what evaluates and saves.

    Args:
        step: a :class:`~fiber_d2.engine.step.StepTrainer`, whose storage is the trainer's.
        model: bare, not wrapped for distributed training.
        period: iterations between two looks, the log period of ``step``.
        max_data_share, data_window: of the warning.
    """

    def __init__(
        self,
        step: Any,
        model: nn.Module,
        *,
        period: int,
        max_data_share: float = MAX_DATA_SHARE,
        data_window: int = DATA_WINDOW,
    ) -> None:
        self._step = step
        self._model = model
        self._period = period
        self._max_data_share = max_data_share
        # (seconds of an iteration, of which it waited for data)
        self._recent: deque[tuple[float, float]] = deque(maxlen=data_window)
        self._seconds: list[float] = []
        self._silent_until = 0

    def before_train(self) -> None:
        self._rates = rate_kinds(self._model, self._step.optimizer)
        self._num_images = self._step.num_images

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self._seconds.append(time.perf_counter() - self._start)
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            if comm.is_main_process():
                self._record()
            self._seconds = []

    def _record(self) -> None:
        storage = self.trainer.storage
        first = self.trainer.iter + 1 - len(self._seconds)
        # A step that was left out has no entry.
        history = storage.histories().get("data_time")
        by_iteration = {i: v for v, i in history.values()[-len(self._seconds) :]} if history else {}
        waited = [by_iteration.get(first + k, 0.0) for k in range(len(self._seconds))]
        seconds = max(sum(self._seconds), 1e-9)
        images = (self._step.num_images - self._num_images) * comm.get_world_size()
        self._num_images = self._step.num_images
        numbers = {
            "images_per_second": images / seconds,
            "data_time_share": min(sum(waited) / seconds, 1.0),
            "host_memory_gib": peak_process_bytes() / GIB,
        }
        if torch.cuda.is_available():
            numbers["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
        if len(self._rates) > 1:
            groups = self._step.optimizer.param_groups
            numbers |= {f"lr/{kind}": groups[i]["lr"] for kind, i in self._rates.items()}
        storage.put_scalars(**numbers, smoothing_hint=False)
        self._watch_data(first, waited)

    def _watch_data(self, first: int, waited: list[float]) -> None:
        iteration = self.trainer.iter
        fresh = max(self.trainer.start_iter + WARM_UP - first, 0)
        self._recent.extend(list(zip(self._seconds, waited))[fresh:])
        if len(self._recent) < self._recent.maxlen or iteration < self._silent_until:
            return
        seconds, waiting = map(sum, zip(*self._recent))
        if waiting <= self._max_data_share * seconds:
            return
        self._silent_until = iteration + REPEAT_AFTER
        count = len(self._recent)
        logger.warning(
            "Waiting for images took %.0f %% of the last %d iterations (%.3g of %.3g seconds "
            "each): training is slowed down by its data. %s Or keep the images on a local disk, at "
            "about the size at which they are trained on.",
            100 * waiting / seconds,
            count,
            waiting / count,
            seconds / count,
            _more_workers(self.trainer),
        )


def _more_workers(trainer: Any) -> str:
    loader = getattr(trainer, "data_loader", None)
    workers = getattr(loader, "num_workers", None)
    keys = "dataloader.train.num_workers, in a yaml file DATALOADER.NUM_WORKERS"
    if workers is None:
        return f"Raise num_workers ({keys})."
    cores = _num_cores()
    processes = comm.get_local_size()
    now = f"now {workers} for each of {processes} processes that share {cores} CPU cores"
    if workers * processes >= cores:
        return (
            f"There are as many loading processes as this machine can use (num_workers is {now}): "
            "spread the training over more machines, or make augmentations cheaper."
        )
    return f"Raise num_workers ({keys}; {now})."


def _num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
