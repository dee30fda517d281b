"""The order in which training images are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from detectron2.utils import comm
from torch.utils.data import Sampler

# Draws that are made at once where data sets are mixed by weight.
_BLOCK = 4096
# First words of the seeds, so that the two kinds of draws are independent.
_ORDER, _CHOICE = 0, 1


class TrainingStream:
    """An endless sequence of indices into several data sets laid end to end.

    Every number in it is a function of the seed and its position, so the stream can be entered
    anywhere and is the same in all processes.

    Args:
        sizes: number of images of each data set.
        weights: share of draws of each data set (of any sum). Each data set then runs through
            shuffled passes of its own. None shuffles all images together.
        shuffle: whether passes are shuffled.
        seed: of all draws, not negative.

    Raises:
        ValueError: sizes or weights that cannot be drawn from.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if len(sizes) == 0 or min(sizes) < 1:
            raise ValueError(f"Every data set needs at least one image; the sizes are {sizes}.")
        if seed < 0:
            raise ValueError(f"The seed of the training stream must not be negative, not {seed}.")
        if weights is None:
            self.sizes, self.shares = [sum(sizes)], np.ones(1)
        else:
            self.sizes, self.shares = list(sizes), np.array(list(weights), dtype=float)
            if len(weights) != len(sizes):
                raise ValueError(f"There are {len(weights)} weights for {len(sizes)} data sets.")
            if not np.isfinite(self.shares).all() or self.shares.min() < 0 or not self.shares.sum():
                raise ValueError(f"Weights must be >= 0 with one above, not {list(weights)}.")
        self.shares = self.shares / self.shares.sum()
        self.starts = np.cumsum([0, *self.sizes[:-1]])
        self.shuffle = shuffle
        self.seed = seed

    def _pass(self, source: int, number: int) -> np.ndarray:
        size = self.sizes[source]
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng([self.seed, _ORDER, source, number]).permutation(size)

    def _sources(self, block: int) -> np.ndarray:
        if len(self.sizes) == 1:
            return np.zeros(_BLOCK, dtype=np.int64)
        generator = np.random.default_rng([self.seed, _CHOICE, block])
        return generator.choice(len(self.sizes), size=_BLOCK, p=self.shares)

    def start_at(self, position: int) -> Iterator[int]:
        """The indices from ``position`` of the stream on."""
        first_block, skipped = divmod(position, _BLOCK)
        drawn = np.zeros(len(self.sizes), dtype=np.int64)
        if len(self.sizes) == 1:
            drawn[0] = first_block * _BLOCK
        else:
            for block in range(first_block):
                drawn += np.bincount(self._sources(block), minlength=len(drawn))
        passes: dict[int, tuple[int, np.ndarray]] = {}
        block = first_block
        while True:
            for offset, source in enumerate(self._sources(block).tolist()):
                number, within = divmod(int(drawn[source]), self.sizes[source])
                drawn[source] += 1
                if block == first_block and offset < skipped:
                    continue
                if source not in passes or passes[source][0] != number:
                    passes[source] = (number, self._pass(source, number))
                yield int(self.starts[source] + passes[source][1][within])
            block += 1


class TrainingBatchSampler(Sampler):
    """Each process's share of one endless sequence of global batches.

    The batches do not depend on the number of processes: batch ``i`` of ``W`` processes together
    is batch ``i`` of one, of which process ``r`` takes images ``r, r + W, ...``.

    Args:
        stream: order of the images.
        total_batch_size: images per step over all processes.
        start_index: number of batches to leave out at the beginning, for a run that continues.
        groups: where given, a group number for each image; a batch then holds one group only.
        rank, world_size: by default those of this process.

    Yields:
        Lists of ``(position, index)``: the image's place in the sequence and its index.

    Raises:
        ValueError: the batch cannot be divided among the processes.
    """

    def __init__(
        self,
        stream: TrainingStream,
        *,
        total_batch_size: int,
        start_index: int = 0,
        groups: Sequence[int] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.stream = stream
        self.total_batch_size = total_batch_size
        self.start_index = start_index
        self.groups = groups
        self.rank = comm.get_rank() if rank is None else rank
        self.world_size = comm.get_world_size() if world_size is None else world_size
        if total_batch_size < 1 or total_batch_size % self.world_size:
            raise ValueError(
                f"The total batch size {total_batch_size} must be a multiple of the number of "
                f"processes, {self.world_size}."
            )
        if start_index < 0:
            raise ValueError(f"start_index must not be negative; it is {start_index}.")

    def _global_batches(self) -> Iterator[list[tuple[int, int]]]:
        size = self.total_batch_size
        if self.groups is None:
            position = self.start_index * size
            indices = self.stream.start_at(position)
            while True:
                yield list(zip(range(position, position + size), islice(indices, size)))
                position += size
        yield from islice(self._grouped_batches(), self.start_index, None)

    def _grouped_batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {}
        for item in enumerate(self.stream.start_at(0)):
            group = waiting.setdefault(self.groups[item[1]], [])
            group.append(item)
            if len(group) == self.total_batch_size:
                yield group.copy()
                group.clear()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._global_batches():
            yield batch[self.rank :: self.world_size]
