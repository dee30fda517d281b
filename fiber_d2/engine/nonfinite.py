"""Steps whose loss is not finite: which images they had, and when there were too many."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.utils import comm

from fiber_d2.checkpoint.files import shorten

from .errors import NonFiniteError

logger = logging.getLogger(__name__)

# Losses are looked at where their names are not known: the numbers among them that are none.
GRAD_NORM = "grad_norm"
METRICS = "metrics/"
_MAX_FILES = 32


@dataclass(frozen=True)
class StepRecord:
    """What a process knows of a step.

    Attributes:
        iteration: 0-based.
        metrics: this process's losses, and the norm of the gradients, which all share.
        files: names of its images.
    """

    iteration: int
    metrics: Mapping[str, float]
    files: Sequence[str]

    @property
    def total_loss(self) -> float:
        # A sum is not finite where one of its terms is not.
        return sum(value for name, value in self.metrics.items() if is_loss(name))


def is_loss(name: str) -> bool:
    """Whether a number of a step is part of what is minimised."""
    return name != GRAD_NORM and not name.startswith(METRICS)


class NonFiniteSteps:
    """Counts the steps that were left out, names their images, and ends the training in time.

    Args:
        limit: so many steps in a row end it.

    Attributes:
        in_a_row: left out since the last good step.
        total: left out since the training began.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"max_nonfinite is {limit}, but it has to be at least 1.")
        self.limit = limit
        self.in_a_row = 0
        self.total = 0

    def note_good(self) -> None:
        """A step has changed the weights."""
        self.in_a_row = 0

    def note_bad(self, iteration: int, description: str) -> None:
        """A step has changed nothing.

        Raises:
            NonFiniteError: it was the last one that is put up with.
        """
        self.in_a_row += 1
        self.total += 1
        logger.warning("Iteration %d is left out, it changes no weight: %s", iteration, description)
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row, up to iteration {iteration}, were not finite "
                f"(train.max_nonfinite). The last one: {description}. They have changed no weight, "
                "nor has a checkpoint suffered from them. Look at these images, lower the "
                "learning rate, clip gradients (train.clip_grad) or train in bfloat16 or full "
                "precision, and go on with --resume."
            )

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.in_a_row = state_dict["in_a_row"]
        self.total = state_dict["total"]


def describe_steps(records: Sequence[StepRecord]) -> dict[int, str]:
    """Of steps that were left out, by iteration: which process had what in which images.

    All processes have to call it, with the same iterations; all get the same answer.
    """
    everyones = comm.all_gather(list(records))
    found = {}
    for index, record in enumerate(records):
        steps = [(rank, own[index]) for rank, own in enumerate(everyones)]
        guilty = [(rank, own) for rank, own in steps if not math.isfinite(own.total_loss)]
        cause = "" if guilty else "the losses are finite, but their gradients are not; "
        found[record.iteration] = cause + "; ".join(_tell(*step) for step in guilty or steps)
    return found


def file_names(batch: Any) -> list[str]:
    """Names of the images in a batch of Detectron2's dicts; none of anything else."""
    if not isinstance(batch, Sequence):
        return []
    known = [item for item in batch if isinstance(item, Mapping) and "file_name" in item]
    return [str(item["file_name"]) for item in known]


def _tell(rank: int, step: StepRecord) -> str:
    shown = ", ".join(f"{name} = {value:.4g}" for name, value in step.metrics.items())
    where = f" in process {rank}" if comm.get_world_size() > 1 else ""
    images = f", images {shorten(list(step.files), _MAX_FILES)}" if step.files else ""
    return f"{shown}{where}{images}"
