"""What evaluators share: bringing prediction records to the main process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any

from detectron2.utils import comm

Record = dict[str, Any]


def gather_records(records: list[Record], *, distributed: bool = True) -> list[Record] | None:
    """The records of all processes in rank order on the main process, None on the others."""
    if not distributed or comm.get_world_size() == 1:
        return list(records)
    comm.synchronize()
    gathered = comm.gather(records, dst=0)
    if not comm.is_main_process():
        return None
    return list(itertools.chain.from_iterable(gathered))


def keep_first(
    records: list[Record], key: Callable[[Record], Hashable]
) -> tuple[dict[Hashable, Record], int]:
    """Records by key, the first of each, and how many repeats were left out.

    Samplers that even out the shares of several processes repeat images; counting an image twice
    would change the score.
    """
    unique: dict[Hashable, Record] = {}
    for record in records:
        unique.setdefault(key(record), record)
    return unique, len(records) - len(unique)
