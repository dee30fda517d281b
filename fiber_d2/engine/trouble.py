"""What escapes a training loop, in words that say where and, if known, what to do."""

from __future__ import annotations

import logging
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.engine import TrainerBase

from .durable import find_disk_full
from .errors import NonFiniteError, PlainRunError, RunError, TrainingStopped, message_of

logger = logging.getLogger(__name__)

# What torch says when a process of a data loader is no more, or does not answer.
_WORKER_GONE = re.compile(r"DataLoader worker \(pid.*?\) (?:exited|is killed)[^\n]*")
_WORKER_SILENT = re.compile(r"DataLoader timed out after (\S+) seconds")


@contextmanager
def name_the_iteration(trainer: TrainerBase, max_iter: int) -> Iterator[None]:
    """Turn what escapes a training loop into an error that says in which iteration it rose.

    A loop that was ended on purpose (:class:`~fiber_d2.engine.errors.TrainingStopped`) ends here.
    """
    try:
        yield
    except TrainingStopped as stop:
        logger.info("Training ends after iteration %d: %s", trainer.iter, stop)
    except NonFiniteError:
        # Its message names the iteration of the loss, which may be some before this one.
        raise
    except Exception as error:
        where = f"Training stopped at iteration {trainer.iter} of {max_iter}: "
        known = _explain(error)
        if known is not None:
            raise PlainRunError(where + known) from error
        raise RunError(f"{where}{type(error).__name__}: {error}") from error


def _explain(error: Exception) -> str | None:
    """One line for troubles that come from outside the program; None for others."""
    if isinstance(error, PlainRunError):
        return message_of(error)
    full = find_disk_full(error)
    if full is not None:
        return f"the disk is full ({full}). Make room and go on with --resume."
    if not isinstance(error, RuntimeError):
        return None
    gone = _WORKER_GONE.search(str(error))
    silent = _WORKER_SILENT.search(str(error))
    if gone is None and silent is None:
        return None
    # They may never end by themselves, and the program waits for them at its end.
    for child in multiprocessing.active_children():
        child.kill()
    if silent is not None:
        return (
            f"the data-loading processes gave no batch for {silent[1]} seconds "
            "(dataloader.train.timeout). Look whether the disk of the images answers, and go on "
            "with --resume."
        )
    return (
        f"a data-loading process has ended ({gone[0].rstrip('. ')}). Mostly memory has run out: "
        "lower dataloader.train.num_workers, or enlarge /dev/shm if it is a bus error; go on with "
        "--resume."
    )
