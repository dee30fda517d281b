"""The loop over the images of a test set: progress, a clean stop on Ctrl-C, and going on."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Callable

import torch
from detectron2.evaluation import DatasetEvaluator, inference_context
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from .interrupts import is_repetition
from .partial import SavedPredictions
from .preemption import awaited, end_if_preempted

logger = logging.getLogger(__name__)

Batch = Sequence[Mapping[str, Any]]

PROGRESS_SECONDS = 5.0
# Two signals at once are one for the user.
_SECOND_THOUGHT_SECONDS = 1.0

# What to do after a signal that ends the program.
_GO_ON = "The same command, for a training with --resume, evaluates again."
_GO_ON_EVALUATING = "The same command with --resume-eval goes on from what is saved."


class EvaluationInterrupted(KeyboardInterrupt):
    """Ctrl-C ended an evaluation; the message says what is saved and how to go on."""


def is_resumable(loader: Any) -> bool:
    """Whether a loader tells which images make up its batches, so that some can be left out."""
    return (
        isinstance(loader, DataLoader)
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def run_inference(
    model: Callable[[Batch], Sequence[Mapping[str, Any]]],
    loader: Iterable[Batch],
    evaluator: DatasetEvaluator,
    *,
    saved: SavedPredictions | None = None,
) -> dict[str, Any]:
    """Show every batch to the model and the evaluator; what the evaluator concludes.

    Args:
        model: switched to evaluation mode while this runs.
        loader: batches; must be resumable (see :func:`is_resumable`) where ``saved`` is given.
        evaluator: is given the batches in the loader's order, saved or not, without ``image``
            those that are saved.
        saved: gets the predictions; those it has already are not computed again. Then Ctrl-C
            ends the loop after the batch at work.

    Returns:
        The evaluator's results; in other processes than the main one usually none.

    Raises:
        EvaluationInterrupted: Ctrl-C, where there is ``saved``.
    """
    evaluator.reset()
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(awaited())
        stop = stack.enter_context(_stop_on_interrupt()) if saved is not None else None
        failure: Exception | None = None
        try:
            for inputs, outputs in _with_progress(model, loader, saved):
                evaluator.process(inputs, outputs)
                end_if_preempted(_GO_ON if saved is None else _GO_ON_EVALUATING)
                if stop is not None and stop.is_set():
                    break
        except Exception as error:
            # Workers of the loader hear Ctrl-C as well, and end.
            if stop is None or not stop.is_set():
                raise
            failure = error
        if stop is not None and stop.is_set():
            raise EvaluationInterrupted(
                f"The predictions up to here are saved in {saved.folder}: the same command with "
                "--resume-eval goes on from them."
            ) from failure
    # No process may be measured, or write, before all have finished.
    comm.synchronize()
    return evaluator.evaluate() or {}


def _with_progress(
    model: Callable[[Batch], Any], loader: Iterable[Batch], saved: SavedPredictions | None
) -> Iterator[tuple[Batch, Any]]:
    if saved is None:
        progress = _Progress(len(loader))
        for inputs in loader:
            yield inputs, model(inputs)
            progress.step(len(inputs))
    else:
        plan = [list(batch) for batch in loader.batch_sampler]
        known = [saved.has(batch) for batch in plan]
        if any(known):
            logger.info("%d of %d batches are saved: going on", sum(known), len(plan))
        todo = [batch for batch, done in zip(plan, known) if not done]
        progress = _Progress(len(todo))
        rest = iter(_rest_of(loader, todo))
        for batch, done in zip(plan, known):
            if done:
                yield saved.load(batch)
                continue
            inputs = next(rest)
            outputs = model(inputs)
            saved.add(batch, inputs, outputs)
            yield inputs, outputs
            progress.step(len(inputs))
    progress.finish()


def _rest_of(loader: DataLoader, batches: Sequence[Sequence[int]]) -> Iterable[Batch]:
    """The same loader with these batches only, which are made up as before."""
    if not batches:
        return ()
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


class _Progress:
    """Logs how far this process is, how fast, and how long it will take."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.batches = self.images = 0
        self.started = self.logged = time.perf_counter()

    def step(self, images: int) -> None:
        self.batches += 1
        self.images += images
        now = time.perf_counter()
        if now - self.logged < PROGRESS_SECONDS:
            return
        self.logged = now
        seconds = now - self.started
        left = timedelta(seconds=round(seconds / self.batches * (self.total - self.batches)))
        logger.info(
            "Evaluated %d of %d batches of this process, %.2f images/s, ETA %s",
            self.batches,
            self.total,
            self.images / seconds,
            left,
        )

    def finish(self) -> None:
        seconds = time.perf_counter() - self.started
        logger.info(
            "Evaluated %d images in %s (%.2f images/s) in each of %d process(es)",
            self.images,
            timedelta(seconds=round(seconds)),
            self.images / max(seconds, 1e-9),
            comm.get_world_size(),
        )


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """The event is set by Ctrl-C; a second one, a moment later, ends the program at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals.
        yield stop
        return
    first = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first
        if is_repetition():
            return
        if stop.is_set() and time.monotonic() - first > _SECOND_THOUGHT_SECONDS:
            raise KeyboardInterrupt
        if not stop.is_set():
            first = time.monotonic()
            stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
