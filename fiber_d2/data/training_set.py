"""What training workers read from: seeded by position, and steady where an image is broken."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .images import IMAGE_ERRORS
from .mapper import FiberDatasetMapper

logger = logging.getLogger(__name__)

# A few broken images say nothing about their share yet.
MIN_FAILED = 10


@dataclass(frozen=True)
class TrainingPart:
    """One of the data sets that training images are drawn from.

    Attributes:
        name: in the catalogue.
        records: those that are trained on, by index.
        mapper: makes a model input of one.
    """

    name: str
    records: Sequence[dict[str, Any]]
    mapper: FiberDatasetMapper


class TrainingSet(Dataset):
    """Maps ``(position, index)`` of the training stream to the model input of image ``index``.

    Random numbers depend on the seed and the position alone, whichever process reads the image.
    An image that cannot be read is tried again (network file systems recover), then replaced by
    another one, which position and seed determine as well, and a warning names it.

    Args:
        dataset: maps an index to a model input.
        seed: of augmentations and replacements.
        retries: further attempts at a broken image.
        retry_wait: seconds before the first of them; doubled before each next one.
        max_failed_share: of the images that this process has drawn, replacements included. A
            larger share of broken ones, of which there are ten or more, ends the training.
        parts: the data sets that ``dataset`` lays end to end, for checks before training.

    Raises:
        FileNotFoundError, ValueError: as of the dataset, where too many images are broken, or for
            anything that is wrong with annotations.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        retries: int = 2,
        retry_wait: float = 0.2,
        max_failed_share: float = 0.01,
        parts: Sequence[TrainingPart] = (),
    ) -> None:
        if retries < 0 or retry_wait < 0:
            raise ValueError(
                f"retries and retry_wait must not be negative; they are {retries} and {retry_wait}."
            )
        if not 0 <= max_failed_share <= 1:
            raise ValueError(f"max_failed_share must be within 0 .. 1, not {max_failed_share}.")
        self.dataset = dataset
        self.seed = seed
        self.retries = retries
        self.retry_wait = retry_wait
        self.max_failed_share = max_failed_share
        self.parts = tuple(parts)
        self.num_drawn = 0
        self.num_failed = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        for replacement in range(MIN_FAILED + 1):
            found = self._read(position, index)
            if found is not None:
                return found
            generator = np.random.default_rng([self.seed, position, replacement])
            index = int(generator.integers(len(self.dataset)))
        raise ValueError(
            f"{MIN_FAILED + 1} training images one after the other cannot be read; the log names "
            "them. Check that the image folder is complete and reachable."
        )

    def _read(self, position: int, index: int) -> dict[str, Any] | None:
        """The model input of image ``index``, or None where the image is broken."""
        self.num_drawn += 1
        seed = int(np.random.SeedSequence([self.seed, position]).generate_state(1)[0])
        for attempt in range(self.retries + 1):
            try:
                with seeded(seed):
                    return self.dataset[index]
            except IMAGE_ERRORS as error:
                failure = error
            if attempt < self.retries:
                time.sleep(self.retry_wait * 2**attempt)
        self.num_failed += 1
        logger.warning(
            "Left out a training image (number %d of %d that this process has drawn): %s",
            self.num_failed,
            self.num_drawn,
            failure,
        )
        if self.num_failed >= max(MIN_FAILED, self.max_failed_share * self.num_drawn):
            raise ValueError(
                f"{self.num_failed} of {self.num_drawn} training images cannot be read, more than "
                f"the share of {self.max_failed_share:g} that is put up with (max_failed_share). "
                f"The last one: {failure}"
            ) from failure
        return None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random number generators for a while; those of the training itself go on after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
