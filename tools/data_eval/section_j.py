"""Samplers: the published runs' orders, and what ours promises

SPEC_DATA_EVAL section 5.12, ``j_samplers.json``.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from fiber_d2.data.legacy_order import (
    legacy_aspect_groups,
    legacy_distributed_indices,
    legacy_grouped_batches,
    legacy_iteration_batches,
)
from fiber_d2.data.samplers import TrainingBatchSampler, TrainingStream

from .common import Section, read_json


def check(directory: Path) -> Section:
    section = Section("j")
    content = read_json(directory, "j_samplers.json")
    parts = {
        "distributed": _check_distributed,
        "grouped": _check_grouped,
        "iteration_based": _check_iterations,
    }
    for name, check_part in parts.items():
        for number, item in enumerate(content[name]):
            with section.case(f"{name} {number}"):
                check_part(section, item)
    return section


def _check_distributed(section: Section, item: dict[str, Any]) -> None:
    size, world_size = item["n"], item["world"]
    found = legacy_distributed_indices(
        size, world_size, epoch=item["epoch"], shuffle=item["shuffle"]
    )
    section.equal("indices of the ranks", found, item["per_rank"])
    stream = TrainingStream([size], shuffle=item["shuffle"], seed=item["epoch"])
    shown = list(islice(stream.start_at(0), 2 * size))
    for number in range(2):
        one = shown[number * size : (number + 1) * size]
        section.equal(f"ours, pass {number} shows each image once", sorted(one), list(range(size)))
    _check_processes(section, stream, world_size, None)


def _check_grouped(section: Section, item: dict[str, Any]) -> None:
    groups = legacy_aspect_groups(*zip(*item["height_width"]))
    section.equal("groups", groups, item["group_ids"])
    found = legacy_grouped_batches(
        item["sampler_order"],
        item["group_ids"],
        item["batch_size"],
        drop_uneven=item["drop_uneven"],
    )
    section.equal("batches", found, item["batches"])
    stream = TrainingStream([len(groups)])
    batches = _batches(stream, item["batch_size"], groups)
    mixed = [batch for batch in batches if len({groups[index] for _, index in batch}) != 1]
    section.equal("ours, batches of several groups", mixed, [])
    _check_processes(section, stream, item["batch_size"], groups)


def _check_iterations(section: Section, item: dict[str, Any]) -> None:
    size, order = item["batch_size"], item["order"]
    of_pass = [order[start : start + size] for start in range(0, len(order), size)]
    if item["drop_last"] and len(of_pass[-1]) < size:
        del of_pass[-1]
    found = legacy_iteration_batches(
        lambda iteration: of_pass, item["num_iterations"], item["start_iter"]
    )
    section.equal("batches", list(found), item["batches"])
    # Where the original starts over, ours goes on.
    stream, start = TrainingStream([len(order)]), item["start_iter"]
    whole = _batches(stream, size, count=item["num_iterations"])
    later = _batches(stream, size, count=item["num_iterations"] - start, start_index=start)
    section.equal("ours, a run that continues", later, whole[start:])


def _check_processes(
    section: Section, stream: TrainingStream, world_size: int, groups: list[int] | None
) -> None:
    """The processes' shares are disjoint and make up the batches of a single process."""
    total = 2 * world_size
    whole = _batches(stream, total, groups)
    shares = [
        _batches(stream, total, groups, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    joined = [sorted(sum(parts, [])) for parts in zip(*shares)]
    section.equal("ours, shares of the processes", joined, [sorted(batch) for batch in whole])


def _batches(
    stream: TrainingStream,
    total_batch_size: int,
    groups: list[int] | None = None,
    *,
    count: int = 20,
    **options: int,
) -> list[list[tuple[int, int]]]:
    sampler = TrainingBatchSampler(
        stream,
        total_batch_size=total_batch_size,
        groups=groups,
        **{"rank": 0, "world_size": 1, **options},
    )
    return list(islice(iter(sampler), count))
