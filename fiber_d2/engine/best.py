"""The best checkpoint by a metric of the evaluations, and the end of a training that stalls."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from .checkpointer import FiberCheckpointer
from .durable import write_json
from .errors import TrainingStopped
from .hooks import EvaluationHook

logger = logging.getLogger(__name__)

BEST_CHECKPOINT = "model_best"
BEST_FILE = "best.json"
MODES = ("max", "min")


def check_best_options(
    best: Mapping[str, Any] | None,
    early_stop: Mapping[str, Any] | None,
    test_best: Sequence[str] = (),
) -> None:
    """That ``train.best``, ``train.early_stop`` and ``train.test_best`` make sense together.

    Raises:
        ValueError: they do not.
    """
    for name, node, needed, known in (
        ("best", best, "metric", ("metric", "mode")),
        ("early_stop", early_stop, "patience", ("patience",)),
    ):
        unknown = sorted(set(node or ()) - set(known))
        if unknown:
            raise ValueError(f"train.{name} has no key {unknown[0]!r}, but {', '.join(known)}.")
        if node is not None and node.get(needed) is None:
            raise ValueError(f"train.{name} lacks its {needed}.")
    if best is None and early_stop is not None:
        raise ValueError(
            "train.early_stop needs a metric: give train.best={metric:DATASET/bbox/AP}."
        )
    if best is None and test_best:
        raise ValueError(
            "train.test_best tests the best checkpoint: give train.best={metric:DATASET/bbox/AP}."
        )
    # The rest is checked where it is used.
    MetricHistory(**(best or {"metric": ""}), **(early_stop or {}))


def check_best_metric(best: Mapping[str, Any] | None, test_sets: Sequence[str]) -> None:
    """That the metric of ``train.best`` is of a data set that is evaluated.

    Raises:
        ValueError: it is not; names those that are.
    """
    if best is None or any(best["metric"].startswith(f"{name}/") for name in test_sets):
        return
    raise ValueError(
        f"train.best.metric is {best['metric']!r}, but it has to begin with the name of a test set "
        f"and a slash, as {(list(test_sets) or ['custom_val'])[0]}/bbox/AP does; there "
        f"{'are ' + ', '.join(test_sets) if test_sets else 'is no test set'}."
    )


class MetricHistory:
    """The evaluations of a run, and what follows from them.

    As the original decides: an evaluation as good as the best one so far is a new best; a worse
    one counts against the patience, and a new best begins the count anew. What is not a finite
    number is worse than anything.

    Args:
        metric: its name, only noted down.
        mode: "max" where more is better, "min" where less is.
        patience: so many worse evaluations in a row are enough; None never has enough.

    Attributes:
        evaluations: pairs (iteration, value), iterations rising.
        best: the best of them, the last one of equals; None while there is none.
        num_worse: evaluations since the best one.

    Raises:
        ValueError: an unknown mode, or a patience below 1.
    """

    def __init__(self, metric: str, mode: str = "max", patience: int | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"The mode of the best metric is {mode!r}: give {' or '.join(MODES)}.")
        if patience is not None and patience < 1:
            raise ValueError(
                f"The patience is {patience} evaluations, but it has to be at least 1; leave out "
                "train.early_stop to train to the end."
            )
        self.metric = metric
        self.mode = mode
        self.patience = patience
        self.restart()

    def restart(self, evaluations: Sequence[tuple[int, float]] = ()) -> None:
        """Begin anew with these evaluations."""
        self.evaluations: list[tuple[int, float]] = []
        self.best: tuple[int, float] | None = None
        self.num_worse = 0
        for iteration, value in evaluations:
            self.add(int(iteration), float(value))

    def add(self, iteration: int, value: float) -> bool:
        """Note an evaluation; whether it is the best one so far."""
        self.evaluations.append((iteration, value))
        if not math.isfinite(value) or (self.best is not None and self._worse(value)):
            self.num_worse += 1
            return False
        self.best = (iteration, value)
        self.num_worse = 0
        return True

    def _worse(self, value: float) -> bool:
        return value < self.best[1] if self.mode == "max" else value > self.best[1]

    @property
    def has_enough(self) -> bool:
        """Whether the training has stalled for as long as the patience allows."""
        return self.patience is not None and self.num_worse >= self.patience


class BestCheckpoint(HookBase):
    """Keeps the weights of the best evaluation, and may stop a training that no longer improves.

    ``model_best.pth`` holds weights alone, averaged ones too where there are; ``best.json`` all
    values of the metric and which is the best. The process that has the results tells the others
    the value, so all of them decide alike. Checkpoints hold the history, so a run that goes on
    decides as if never interrupted: a checkpoint is written before the evaluation of its
    iteration, which is therefore made up for.

    Register it behind the evaluation.

    Args:
        evaluation: whose results are looked at.
        checkpointer: of the model; the files go to its folder.
        metric: such as ``custom_val/bbox/AP``: the data set and the path in its results.
        mode: "max" or "min".
        patience: evaluations in a row below the best one after which to stop, or None.
        listeners: called with each finite value, in all processes (plateau schedules).
        on_stop: called in all processes before a stalled training ends, such as to save.

    Attributes:
        saved: iteration and value of what ``path`` holds; None where there is no such file. After
            a restart it may be of iterations that are still to be done again.

    Raises:
        ValueError: as of :class:`MetricHistory`.
    """

    def __init__(
        self,
        evaluation: EvaluationHook,
        checkpointer: FiberCheckpointer,
        *,
        metric: str,
        mode: str = "max",
        patience: int | None = None,
        listeners: Sequence[Callable[[float], Any]] = (),
        on_stop: Callable[[], Any] = lambda: None,
    ) -> None:
        self.history = MetricHistory(metric, mode, patience)
        self.evaluation = evaluation
        self.listeners = list(listeners)
        self.on_stop = on_stop
        self._checkpointer = checkpointer
        self.saved: tuple[int, float] | None = None

    @property
    def path(self) -> str:
        """Of the best checkpoint."""
        return os.path.join(self._checkpointer.save_dir, f"{BEST_CHECKPOINT}.pth")

    @property
    def stopped(self) -> str:
        """Why the training has been stopped, "" where it has not been."""
        history = self.history
        if not history.has_enough:
            return ""
        return f"{history.metric} has not reached its best in {history.num_worse} evaluations"

    def before_train(self) -> None:
        done = self.trainer.start_iter - 1
        if done < 0:
            self._forget()
            return
        values = self._recall()
        if self.history.has_enough:
            raise TrainingStopped(self.stopped)
        if self._has(done):
            return
        # The checkpoint is older than the evaluation of its own iteration.
        if done in values:
            self._take(done, values[done])
        elif self.evaluation.is_due(done):
            logger.info("Making up for the evaluation after iteration %d", done)
            self.evaluation.evaluate_now(done)
            self._take(done, self._value_of(self.evaluation.results))

    def after_step(self) -> None:
        if self.evaluation.last_iteration == self.trainer.iter:
            self._take(self.trainer.iter, self._value_of(self.evaluation.results))

    def _value_of(self, results: Mapping[str, Any]) -> float:
        """The metric, which only the main process knows, in all processes.

        Raises:
            KeyError: the evaluation gives no such number; lists those that it gives.
        """
        numbers = {
            name: float(value)
            for name, value in flatten_results_dict(dict(results)).items()
            if isinstance(value, (int, float))
        }
        metric = self.history.metric
        known = None if metric in numbers else sorted(numbers)
        value, known = comm.all_gather((numbers.get(metric, math.nan), known))[0]
        if known is not None:
            raise KeyError(
                f"The evaluation gives no number {metric!r} for train.best.metric; there are: "
                f"{', '.join(known) or 'none at all'}."
            )
        return value

    def finish(self, iteration: int, results: Mapping[str, Any]) -> None:
        """For a run that is resumed when all iterations are done: the last evaluation counts, too.

        Where it is noted already the files stay as they are. (A yaml configuration's trainer runs
        its hooks even then, which note it anew.)

        Args:
            iteration: the last one, whose weights the model has.
            results: of their evaluation, in the main process.
        """
        values = self._recall()
        if self._has(iteration):
            return
        if iteration in values:
            # The last checkpoint is older than its evaluation, but the files are not: they stay.
            self.history.add(iteration, values[iteration])
        else:
            self._note(iteration, self._value_of(results))

    def _has(self, iteration: int) -> bool:
        return iteration in [known for known, _ in self.history.evaluations]

    def _take(self, iteration: int, value: float) -> None:
        self._note(iteration, value)
        if math.isfinite(value):
            for listener in self.listeners:
                listener(value)
        if self.history.has_enough:
            self.on_stop()
            raise TrainingStopped(self.stopped)

    def _note(self, iteration: int, value: float) -> None:
        history = self.history
        if not math.isfinite(value):
            logger.warning("%s is %s after iteration %d", history.metric, value, iteration)
        if history.add(iteration, value):
            self._checkpointer.save_weights(BEST_CHECKPOINT, iteration=iteration)
            self.saved = history.best
            logger.info("%s: %.4f, the best so far", history.metric, value)
        elif history.best is not None:
            logger.info(
                "%s: %.4f, the best is %.4f after iteration %d (%d since then%s)",
                history.metric,
                value,
                history.best[1],
                history.best[0],
                history.num_worse,
                f", {history.patience} end the training" if history.patience else "",
            )
        if comm.is_main_process():
            write_json(self.json_path, self.summary())

    def summary(self) -> dict[str, Any]:
        """What ``best.json`` holds; numbers that are not finite are None."""

        def entry(pair: tuple[int, float]) -> dict[str, Any]:
            iteration, value = pair
            return {"iteration": iteration, "value": value if math.isfinite(value) else None}

        history = self.history
        return {
            "metric": history.metric,
            "mode": history.mode,
            "patience": history.patience,
            "checkpoint": os.path.basename(self.path) if self.saved else None,
            "best": entry(self.saved) if self.saved else None,
            "stopped_early": history.has_enough,
            "evaluations": [entry(pair) for pair in history.evaluations],
        }

    @property
    def json_path(self) -> str:
        """Of ``best.json``."""
        return os.path.join(self._checkpointer.save_dir, BEST_FILE)

    def _forget(self) -> None:
        """Begin without what an older run has left in the folder."""
        self.history.restart()
        self.saved = None
        if comm.is_main_process():
            for path in (self.path, self.json_path):
                if os.path.exists(path):
                    os.remove(path)
        comm.synchronize()

    def _recall(self) -> dict[int, float]:
        """Values by iteration of ``best.json``, which may be newer than the last checkpoint.

        What the best checkpoint on the disk holds is found there, too. Alike in all processes.
        """
        values: dict[int, float] = {}
        saved = None
        if comm.is_main_process() and os.path.exists(self.json_path):
            with open(self.json_path) as file:
                content = json.load(file)
            if (content["metric"], content["mode"]) == (self.history.metric, self.history.mode):
                values = {
                    row["iteration"]: math.nan if row["value"] is None else row["value"]
                    for row in content["evaluations"]
                }
                if content["best"] is not None and os.path.exists(self.path):
                    saved = (content["best"]["iteration"], content["best"]["value"])
        values, self.saved = comm.all_gather((values, saved))[0]
        return values

    def state_dict(self) -> dict[str, Any]:
        history = self.history
        return {
            "metric": history.metric,
            "mode": history.mode,
            "evaluations": [list(pair) for pair in history.evaluations],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        history = self.history
        if (state_dict["metric"], state_dict["mode"]) != (history.metric, history.mode):
            logger.warning(
                "The checkpoint has seen the best %s, this run looks at %s: it begins to count "
                "anew.",
                state_dict["metric"],
                history.metric,
            )
            return
        history.restart(state_dict["evaluations"])
