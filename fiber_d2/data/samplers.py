"""The order in which training images are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Union

import numpy as np
from detectron2.utils import comm
from torch.utils.data import Sampler

Weights = Union[Sequence[float], Mapping[int, Sequence[float]]]

# Draws that are made at once.
_BLOCK = 4096
# First words of the seeds, so that the kinds of draws are independent.
_ORDER, _CHOICE, _ROUNDING = 0, 1, 2
# Repeat factors are whole multiples of this, so that sums of them are exact.
_FACTOR_BITS = 20
_FACTOR_ONE = 1 << _FACTOR_BITS
_MAX_FACTOR = 1 << 20


class TrainingStream:
    """An endless sequence of indices into several data sets laid end to end.

    Every number in it is a function of the seed and its position, so the stream can be entered
    anywhere and is the same in all processes. Entering costs one pass of each data set, and
    with weights about 0.1 ms for every 4096 images gone by.

    Args:
        sizes: number of images of each data set.
        weights: share of draws of each data set (of any sum); or several such lists by the
            position from which on they hold, the first one from 0. Each data set then runs
            through shuffled passes of its own. None shuffles all images together.
        repeats: how many times each data set is shown in a pass, at least 1. By default once.
        repeat_factors: for each data set None, or how often each of its images is shown in a pass
            (see :mod:`fiber_d2.data.resampling`). A factor of 1.3 is once in 70 % of the passes
            and twice in the others, drawn anew for each pass. Multiplied by ``repeats``.
        shuffle: whether passes are shuffled.
        seed: of all draws, not negative.

    Attributes:
        images_per_pass: images of a pass on average, repeats included: one number, or with
            weights one for each data set.

    Raises:
        ValueError: sizes, weights or factors that cannot be drawn from.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        weights: Weights | None = None,
        repeats: Sequence[int] | None = None,
        repeat_factors: Sequence[Sequence[float] | np.ndarray | None] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if len(sizes) == 0 or min(sizes) < 1:
            raise ValueError(f"Every data set needs at least one image; the sizes are {sizes}.")
        if seed < 0:
            raise ValueError(f"The seed of the training stream must not be negative, not {seed}.")
        factors = _all_factors(sizes, repeats, repeat_factors)
        if weights is None:
            self.sizes = [sum(sizes)]
            factors = [None if factors is None else np.concatenate(factors)]
        else:
            self.sizes = list(sizes)
            self._changes, self._bounds = _weight_schedule(weights, len(sizes))
            factors = [None] * len(sizes) if factors is None else factors
        self.starts = np.cumsum([0, *self.sizes[:-1]])
        self.shuffle = shuffle
        self.seed = seed
        self._passes = [
            _Passes(size, own, shuffle=shuffle, seed=seed, source=source)
            for source, (size, own) in enumerate(zip(self.sizes, factors))
        ]
        self.images_per_pass = [passes.mean_length for passes in self._passes]

    def _sources(self, block: int) -> np.ndarray:
        draws = np.random.default_rng([self.seed, _CHOICE, block]).random(_BLOCK)
        positions = np.arange(block * _BLOCK, (block + 1) * _BLOCK)
        bounds = self._bounds[np.searchsorted(self._changes, positions, side="right") - 1]
        return (draws[:, None] >= bounds).sum(axis=1)

    def passes_after(self, num_draws: int) -> list[float]:
        """How many passes so many draws make, on average: of all images, or of each data set."""
        if len(self.sizes) == 1:
            return [num_draws / self.images_per_pass[0]]
        shares = np.diff(self._bounds, prepend=0, axis=1)  # (S, sets)
        lengths = np.diff(np.minimum([*self._changes, num_draws], num_draws))  # (S,)
        return (lengths @ shares / self.images_per_pass).tolist()

    def blocks(self, position: int) -> Iterator[np.ndarray]:
        """The indices from ``position`` of the stream on, int64 arrays of at most 4096."""
        if len(self.sizes) == 1:
            while True:
                yield (block := self._passes[0].take(position, _BLOCK))
                position += len(block)
        first_block, skipped = divmod(position, _BLOCK)
        drawn = np.zeros(len(self.sizes), dtype=np.int64)
        for block in range(first_block):
            drawn += np.bincount(self._sources(block), minlength=len(drawn))
        block = first_block
        while True:
            sources = self._sources(block)
            indices = np.empty(_BLOCK, dtype=np.int64)
            for source, passes in enumerate(self._passes):
                places = np.flatnonzero(sources == source)
                indices[places] = self.starts[source] + passes.take(drawn[source], len(places))
                drawn[source] += len(places)
            yield indices[skipped:]
            skipped = 0
            block += 1

    def start_at(self, position: int) -> Iterator[int]:
        """The indices from ``position`` of the stream on."""
        for block in self.blocks(position):
            yield from block.tolist()


class _Passes:
    """Pass after pass through images, as one sequence that is entered anywhere.

    With factors of the sum ``F``, passes end at the whole parts of ``F``, ``2 F``, ... Their
    lengths differ by one at most, and where a pass begins needs no other pass to be known.
    """

    def __init__(
        self, size: int, factors: np.ndarray | None, *, shuffle: bool, seed: int, source: int
    ) -> None:
        self.size = size
        self.factors = factors  # int64 multiples of 1 / _FACTOR_ONE
        self.total = size * _FACTOR_ONE if factors is None else int(factors.sum())
        self.mean_length = self.total / _FACTOR_ONE
        self.shuffle = shuffle
        self.seed = seed
        self.source = source
        self._kept: tuple[int, np.ndarray] | None = None

    def take(self, position: int, count: int) -> np.ndarray:
        """``count`` indices from ``position`` on."""
        parts = [np.zeros(0, dtype=np.int64)]
        position = int(position)
        while count > 0:
            # The last pass that begins at this position or before.
            number = (((position + 1) << _FACTOR_BITS) - 1) // self.total
            begin = position - self._start(number)
            part = self._pass(number)[begin : begin + count]
            parts.append(part)
            position += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _start(self, number: int) -> int:
        return (number * self.total) >> _FACTOR_BITS

    def _pass(self, number: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != number:
            self._kept = (number, self._make_pass(number))
        return self._kept[1]

    def _make_pass(self, number: int) -> np.ndarray:
        order = self._round(number)
        if not self.shuffle:
            return order
        generator = np.random.default_rng([self.seed, _ORDER, self.source, number])
        return generator.permutation(order)

    def _round(self, number: int) -> np.ndarray:
        """The indices of a pass, ascending, each as often as its factor is rounded to."""
        if self.factors is None:
            return np.arange(self.size)
        # Systematic sampling: the factors are laid end to end in random order, and an index is
        # taken for each mark within its stretch. Marks are 1 apart; where the first one lies is
        # random, but for the number of marks in all, which the place of the pass decides.
        generator = np.random.default_rng([self.seed, _ROUNDING, self.source, number])
        rest = self.total % _FACTOR_ONE
        longer = self._start(number + 1) - self._start(number) > self.total >> _FACTOR_BITS
        low, high = (_FACTOR_ONE - rest, _FACTOR_ONE) if longer else (0, _FACTOR_ONE - rest)
        shuffled = generator.permutation(self.size)
        ends = np.cumsum(self.factors[shuffled]) + generator.integers(low, high)
        times = np.empty(self.size, dtype=np.int64)
        times[shuffled] = np.diff(ends >> _FACTOR_BITS, prepend=0)
        return np.repeat(np.arange(self.size), times)


def _weight_schedule(weights: Weights, num_sets: int) -> tuple[np.ndarray, np.ndarray]:
    """From which positions on (S,), and up to which draws of 0..1 (S, sets) each set is taken."""
    by_position = dict(weights) if isinstance(weights, Mapping) else {0: weights}
    positions = sorted(by_position)
    if not positions or positions[0] != 0:
        raise ValueError(f"The first weights must hold from 0 on; they are given for {positions}.")
    bounds = np.empty((len(positions), num_sets))
    for row, position in enumerate(positions):
        own = np.array(list(by_position[position]), dtype=float)
        if len(own) != num_sets:
            raise ValueError(f"There are {len(own)} weights for {num_sets} data sets.")
        if not np.isfinite(own).all() or own.min() < 0 or not own.sum():
            raise ValueError(f"Weights must be >= 0 with one above, not {own.tolist()}.")
        bounds[row] = (own / own.sum()).cumsum()
        bounds[row] /= bounds[row, -1]
    return np.array(positions, dtype=np.int64), bounds


def _all_factors(
    sizes: Sequence[int],
    repeats: Sequence[int] | None,
    repeat_factors: Sequence[Sequence[float] | np.ndarray | None] | None,
) -> list[np.ndarray] | None:
    """Factors of every data set's images in multiples of ``1 / _FACTOR_ONE``; None: all are 1."""
    if repeats is None and repeat_factors is None:
        return None
    repeats = [1] * len(sizes) if repeats is None else list(repeats)
    given = [None] * len(sizes) if repeat_factors is None else list(repeat_factors)
    if len(repeats) != len(sizes) or len(given) != len(sizes):
        raise ValueError(
            f"There are {len(repeats)} repeats and {len(given)} lists of repeat factors for "
            f"{len(sizes)} data sets."
        )
    if not all(isinstance(times, (int, np.integer)) and times >= 1 for times in repeats):
        raise ValueError(f"Repeats must be whole numbers of at least 1, not {repeats}.")
    factors = []
    for number, (size, times, own) in enumerate(zip(sizes, repeats, given)):
        own = np.ones(size) if own is None else np.asarray(own, dtype=np.float64)
        if own.shape != (size,):
            raise ValueError(f"Data set {number} has {size} images, but {own.size} repeat factors.")
        own = own * times
        if not (np.isfinite(own).all() and own.min() >= 0 and own.max() <= _MAX_FACTOR):
            raise ValueError(
                f"Repeat factors must be from 0 to {_MAX_FACTOR}; see data set {number}."
            )
        factors.append(np.rint(own * _FACTOR_ONE).astype(np.int64))
        if factors[-1].sum() < _FACTOR_ONE:
            raise ValueError(f"The repeat factors of data set {number} add up to less than 1.")
    return factors


class TrainingBatchSampler(Sampler):
    """Each process's share of one endless sequence of global batches.

    The batches do not depend on the number of processes: batch ``i`` of ``W`` processes together
    is batch ``i`` of one, of which process ``r`` takes images ``r, r + W, ...``.

    Entering late costs what entering the stream costs. With ``groups`` the images gone by are
    counted by group, which takes one to three seconds for 50 million.

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
        groups: Sequence[int] | np.ndarray | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.stream = stream
        self.total_batch_size = total_batch_size
        self.start_index = start_index
        # Numbered from 0 as an array: a Python list would cost every process tens of megabytes.
        self.groups = None if groups is None else np.unique(groups, return_inverse=True)[1]
        self.rank = comm.get_rank() if rank is None else rank
        self.world_size = comm.get_world_size() if world_size is None else world_size
        if total_batch_size < 1 or total_batch_size % self.world_size:
            raise ValueError(
                f"The total batch size {total_batch_size} must be a multiple of the number of "
                f"processes, {self.world_size}."
            )
        if start_index < 0:
            raise ValueError(f"start_index must not be negative; it is {start_index}.")
        if self.groups is not None and len(self.groups) != sum(stream.sizes):
            raise ValueError(
                f"There are {len(self.groups)} group numbers for {sum(stream.sizes)} images."
            )

    def _global_batches(self) -> Iterator[list[tuple[int, int]]]:
        size = self.total_batch_size
        if self.groups is not None:
            yield from self._grouped_batches()
        position = self.start_index * size
        indices = self.stream.start_at(position)
        while True:
            yield list(zip(range(position, position + size), islice(indices, size)))
            position += size

    def _grouped_batches(self) -> Iterator[list[tuple[int, int]]]:
        position, left_out, waiting = self._find_batch()
        for item in enumerate(self.stream.start_at(position), position):
            group = waiting[self.groups[item[1]]]
            group.append(item)
            if len(group) == self.total_batch_size:
                if left_out:
                    left_out -= 1
                else:
                    yield group.copy()
                group.clear()

    def _find_batch(self) -> tuple[int, int, list[list[tuple[int, int]]]]:
        """Where to enter the stream so that batch ``start_index`` is completed soon.

        Returns:
            The position, how many batches to leave out from there, and for each group the images
            that wait there for their batch.
        """
        size = self.total_batch_size
        position = 0
        counts = np.zeros(int(self.groups.max()) + 1, dtype=np.int64)
        waiting = [np.zeros((0, 2), dtype=np.int64) for _ in counts]
        for block in self.stream.blocks(0):
            groups = self.groups[block]
            after = counts + np.bincount(groups, minlength=len(counts))
            if (after // size).sum() > self.start_index:
                break
            for group in np.flatnonzero(after > counts):
                places = np.flatnonzero(groups == group)
                items = np.stack([position + places, block[places]], axis=1)
                items = np.concatenate([waiting[group], items])
                waiting[group] = items[len(items) - after[group] % size :]
            counts = after
            position += len(block)
        left_out = self.start_index - int((counts // size).sum())
        return position, left_out, [list(map(tuple, items.tolist())) for items in waiting]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._global_batches():
            yield batch[self.rank :: self.world_size]
