"""A few images per class, as the original chooses them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode


def few_shot_subset(
    records: Sequence[Mapping[str, Any]], k: int, *, seed: int | None = None
) -> list[int]:
    """Choose images until every class was in ``k`` of them.

    Images are gone through in the ascending order of their ids, or in a shuffled one. An image is
    taken if any of its classes was in fewer than ``k`` images taken so far, and then counts for all
    its classes: frequent classes can get more than ``k``. Crowds count like other boxes. Images
    without any box wider and higher than a pixel are left out first.

    Args:
        records: Detectron2 dataset records with ``image_id``, ``annotations`` and any category
            ids; for :class:`~fiber_d2.data.tsv.TSVRecords` each is read once.
        k: images per class; 0 takes all, in the order of ids.
        seed: of the shuffle (``random.Random(seed)`` on the ordered list). None does not shuffle,
            which is also what the original does in its grounding data, whatever seed it is given,
            and in its detection data with the seed 0.

    Returns:
        Indices of the records, in the order they were taken.

    Raises:
        ValueError: ``k`` is negative, or ids of images cannot be ordered.
    """
    if k < 0:
        raise ValueError(f"The number of shots must not be negative, it is {k}.")
    ids, classes = {}, {}
    for index, record in enumerate(records):
        annotations = record.get("annotations", ())
        if _has_box(annotations):
            ids[index] = record["image_id"]
            classes[index] = {annotation["category_id"] for annotation in annotations}
    try:
        order = sorted(ids, key=ids.__getitem__)
    except TypeError as error:
        raise ValueError("The image ids mix numbers and text: they have no order.") from error
    if k == 0:
        return order
    if seed is not None:
        random.Random(seed).shuffle(order)
    left: dict[Any, int] = defaultdict(lambda: k)
    chosen = []
    for index in order:
        if any(left[category] > 0 for category in classes[index]):
            chosen.append(index)
            for category in classes[index]:
                left[category] -= 1
    return chosen


def prepared_file_name(k: int, seed: int) -> str:
    """Name of a published few-shot selection, an ordinary COCO json beside the full one."""
    return f"fewshot_train_shot{k}_seed{seed}.json"


def _has_box(annotations: Iterable[Mapping[str, Any]]) -> bool:
    by_mode: dict[BoxMode, list[Any]] = defaultdict(list)
    for annotation in annotations:
        by_mode[annotation["bbox_mode"]].append(annotation["bbox"])
    return any(
        (BoxMode.convert(np.array(boxes, dtype=float), mode, BoxMode.XYWH_ABS)[:, 2:] > 1)
        .all(axis=1)
        .any()
        for mode, boxes in by_mode.items()
    )
