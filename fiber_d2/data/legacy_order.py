"""The order in which the published runs saw their images, for studies that compare with them.

Training here uses :mod:`fiber_d2.data.samplers`, whose order does not depend on the number of
processes. These functions only say what the original's samplers would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch


def legacy_distributed_indices(
    size: int, world_size: int, *, epoch: int = 0, shuffle: bool = True
) -> list[list[int]]:
    """The indices of each rank: one contiguous block, the head repeated where the last is short.

    Args:
        size: number of images.
        world_size: number of processes.
        epoch: seed of the permutation. The original gives it the number of iterations done when a
            pass starts.
        shuffle: permute at all.

    Raises:
        ValueError: ``size`` or ``world_size`` is not positive.
    """
    if size < 1 or world_size < 1:
        raise ValueError(f"Cannot divide {size} images among {world_size} processes.")
    order = np.arange(size)
    if shuffle:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(epoch)).numpy()
    each = -(-size // world_size)
    return np.resize(order, (world_size, each)).tolist()


def legacy_aspect_groups(heights: Sequence[float], widths: Sequence[float]) -> list[int]:
    """0 for images wider than high, 1 for the others, square ones included."""
    return (np.asarray(heights) >= np.asarray(widths)).astype(int).tolist()


def legacy_grouped_batches(
    order: Sequence[int], group_ids: Sequence[int], batch_size: int, *, drop_uneven: bool = True
) -> list[list[int]]:
    """Batches of one group each, in the order of their first images.

    Args:
        order: what the sampler of images gives, each index once.
        group_ids: group of every index.
        batch_size: images per batch.
        drop_uneven: leave out the last, incomplete batch of a group, as training does.
    """
    members: dict[int, list[tuple[int, int]]] = {}
    for place, index in enumerate(order):
        members.setdefault(group_ids[index], []).append((place, index))
    batches = [
        own[start : start + batch_size]
        for own in members.values()
        for start in range(0, len(own), batch_size)
    ]
    return [
        [index for _, index in batch]
        for batch in sorted(batches)
        if len(batch) == batch_size or not drop_uneven
    ]


def legacy_iteration_batches(
    batches_of_pass: Callable[[int], Sequence[Sequence[int]]],
    num_iterations: int,
    start_iteration: int = 0,
) -> Iterator[list[int]]:
    """Batches of iterations ``start_iteration`` to ``num_iterations``, pass after pass.

    A run that continues starts with the first batch of a pass, wherever it stopped.

    Args:
        batches_of_pass: gives the batches of a pass, called with the number of iterations done.

    Raises:
        ValueError: a pass has no batch.
    """
    done = start_iteration
    while done < num_iterations:
        batches = batches_of_pass(done)
        if len(batches) == 0:
            raise ValueError("A pass without any batch cannot be repeated.")
        for batch in batches[: num_iterations - done]:
            yield list(batch)
            done += 1
