"""What happens between training steps: clock, checkpoints, evaluation."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from .errors import Preempted
from .randomness import preserved_random_state, random_state


class TrainingClock(HookBase):
    """Seconds spent in training steps; a resumed run goes on counting."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self.seconds += time.perf_counter() - self._start

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


class CheckpointHook(hooks.PeriodicCheckpointer):
    """Saves every ``period`` iterations and after the last one; keeps the newest few.

    Every process has to have it: each contributes its random state. Losses are looked at first: too
    many in a row that are not finite end the training before it saves.

    Args:
        checkpointer: of the model, with the trainer as a checkpointable.
        period: iterations between two checkpoints.
        max_to_keep: how many of them stay on disk, ``model_final`` apart; None keeps all.
    """

    def before_train(self) -> None:
        super().before_train()
        if self.max_to_keep is not None and comm.is_main_process():
            # What was saved before a restart counts too.
            self.recent_checkpoints = self._saved_before()

    def _saved_before(self) -> list[str]:
        folder = self.checkpointer.save_dir
        pattern = re.compile(re.escape(self.file_prefix) + r"_\d{7}\.pth")
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        found = [name for name in names if pattern.fullmatch(name)]
        current = f"{self.file_prefix}_{self.trainer.start_iter:07d}.pth"
        return [os.path.join(folder, name) for name in found if name < current]

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if (iteration + 1) % self.period != 0 and iteration < self.max_iter - 1:
            return
        states = self._states()
        if comm.is_main_process():
            self.step(iteration, random_states=states)

    def save_now(self) -> str:
        """Save after this iteration, unless that is done; the path. All processes call it."""
        iteration = self.trainer.iter
        name = f"{self.file_prefix}_{iteration:07d}"
        if (iteration + 1) % self.period != 0:
            self._save(name)
        return os.path.join(self.checkpointer.save_dir, f"{name}.pth")

    def prepare(self) -> None:
        """Get ready to save without the other processes. All processes call it."""
        self._prepared = self._states()

    def save_prepared(self) -> None:
        """Save what was there at :meth:`prepare`, if nothing has changed the weights since."""
        if comm.is_main_process():
            name = f"{self.file_prefix}_{self.trainer.iter:07d}"
            self.save(name, iteration=self.trainer.iter, random_states=self._prepared)

    def save_final(self) -> None:
        """Save what a training that ends early has come to. All processes call it."""
        self._save(f"{self.file_prefix}_final")

    def _save(self, name: str) -> None:
        states = self._states()
        if comm.is_main_process():
            self.save(name, iteration=self.trainer.iter, random_states=states)

    def _states(self) -> list[dict[str, Any]]:
        self.trainer.flush_metrics()
        return comm.gather(random_state())


class EvaluationHook(HookBase):
    """Evaluates every ``period`` iterations and after the last one, never after a failure.

    The random numbers of the training are the same with it and without it.

    Args:
        period: iterations between two evaluations; 0 evaluates at the end only.
        evaluate: results as nested dicts of numbers; called in all processes.
        checkpoint: saves where a signal ends the program during an evaluation, which may be long.

    Attributes:
        results: of the last evaluation; empty in all processes but the main one.
        last_iteration: the iteration after which it was made, in all processes; None before.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict[str, Any]],
        checkpoint: CheckpointHook | None = None,
    ) -> None:
        self.period = period
        self.evaluate = evaluate
        self.checkpoint = checkpoint
        self.results: dict[str, Any] = {}
        self.last_iteration: int | None = None

    def is_due(self, iteration: int) -> bool:
        """Whether there is an evaluation after this iteration, which counts from 0."""
        done = iteration + 1
        return (self.period > 0 and done % self.period == 0) or done == self.trainer.max_iter

    def after_step(self) -> None:
        if self.is_due(self.trainer.iter):
            self.evaluate_now(self.trainer.iter)

    def evaluate_now(self, iteration: int) -> None:
        """Evaluate the weights after ``iteration``; all processes take part."""
        # Not where an evaluation is made up for: the weights are those of the last checkpoint.
        saves = self.checkpoint is not None and iteration == self.trainer.iter
        if saves:
            self.checkpoint.prepare()
        try:
            with preserved_random_state():
                self.results = self.evaluate()
        except Preempted:
            if saves:
                self.checkpoint.save_prepared()
            raise
        self.last_iteration = iteration
        if comm.is_main_process():
            numbers = {
                name: value
                for name, value in flatten_results_dict(self.results).items()
                if isinstance(value, (int, float))
            }
            self.trainer.storage.put_scalars(**numbers, smoothing_hint=False)
        # Evaluation takes its time in each process: start the next iteration together.
        comm.synchronize()


class WritersHook(hooks.PeriodicWriter):
    """Detectron2's hook, whose files are not opened before training begins.

    Args:
        make_writers: called once, when training begins.
        period: iterations between two writes.
    """

    def __init__(self, make_writers: Callable[[], list[EventWriter]], period: int) -> None:
        super().__init__([], period)
        self._make_writers = make_writers

    def before_train(self) -> None:
        self._writers = self._make_writers()
