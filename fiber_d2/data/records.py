"""From the name of a data set to its records: found, filtered, checked, and kept small."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from torch.utils.data import Dataset

from .catalog import DETECTION, GROUNDING
from .mapper import FiberDatasetMapper

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# A box must be larger than this many pixels in both directions to be learned from.
MIN_BOX_SIDE = 1
# Records whose prompts are tried out before anything is computed; spread over the data set.
MAX_CHECKED = 10_000
# Image files that are looked for before anything is computed.
MAX_CHECKED_FILES = 16


def check_registered(name: str) -> None:
    """Raise KeyError, with the nearest names, where no data set of that name is registered."""
    known = DatasetCatalog.list()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise KeyError(
            f"The data set {name!r} is not registered.{hint} One's own data are registered by "
            "fiber_d2.data.register_coco_json(name, json_file, image_root)."
        )


def load_records(name: str) -> Sequence[Record]:
    """The records of a registered data set.

    Raises:
        KeyError: the name is not registered.
        ValueError: the data set is empty.
    """
    check_registered(name)
    records = DatasetCatalog.get(name)
    if len(records) == 0:
        raise ValueError(f"The data set {name!r} holds no image.")
    return records


def ground_truth_kind(name: str, records: Sequence[Record]) -> str:
    """``ground_truth`` of the metadata; for data that others registered, what the records show."""
    known = MetadataCatalog.get(name).get("ground_truth")
    if known:
        return known
    return GROUNDING if len(records) and "caption" in records[0] else DETECTION


def select_records(records: Sequence[Record], indices: Sequence[int]) -> Sequence[Record]:
    """The records of these indices; what reads them when asked stays so (see ``TSVRecords``)."""
    subset = getattr(records, "subset", None)
    return [records[index] for index in indices] if subset is None else subset(indices)


def filter_records(records: Sequence[Record], name: str) -> Sequence[Record]:
    """The records with a box to learn from.

    Raises:
        ValueError: there is none; says why.
    """
    num_records, bare, kept = 0, 0, []
    for record in records:
        annotations = record.get("annotations") or ()
        bare += not annotations
        if any(map(_usable, annotations)):
            kept.append(num_records)
        num_records += 1
    if not kept:
        raise ValueError(
            f"The data set {name!r} has nothing to learn from: of its {num_records} images {bare} "
            f"have no annotation, the others only crowds or boxes of at most {MIN_BOX_SIDE} pixel. "
            "Check that it is the right annotation file (set filter_empty=False to train without "
            "any box)."
        )
    if len(kept) == num_records:
        return records
    logger.info("%s: left out %d images without a usable box", name, num_records - len(kept))
    return select_records(records, kept)


def _usable(annotation: dict[str, Any]) -> bool:
    x, y, right, bottom = annotation["bbox"]
    if annotation["bbox_mode"] == BoxMode.XYXY_ABS:
        right, bottom = right - x, bottom - y
    return not annotation.get("iscrowd", 0) and min(right, bottom) > MIN_BOX_SIDE


def lean_dataset(records: Sequence[Record]) -> Dataset | Sequence[Record]:
    """The same records in a form that costs forked workers no memory of their own.

    A list is serialised into one array, as Detectron2 does; what is lazy already stays.
    """
    return DatasetFromList(records, copy=False) if isinstance(records, list) else records


def wider_than_high(records: Sequence[Record]) -> np.ndarray:
    """Which images are wider than high, bool ``(N,)``."""
    sizes = getattr(records, "image_sizes", None)
    if sizes is None:
        return np.array([record["width"] > record["height"] for record in records], dtype=bool)
    height, width = sizes().T
    return width > height


def check_dataset(records: Sequence[Record], mapper: FiberDatasetMapper, name: str) -> None:
    """Make the prompts of up to 10,000 records and look for some images, before hours of compute.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: a prompt cannot be made; names data set, image and reason.
    """
    for record in _spread(records, MAX_CHECKED_FILES):
        if not PathManager.isfile(record["file_name"]):
            raise FileNotFoundError(
                f"The data set {name!r} lacks the image {record['file_name']}: check its image "
                "folder; datasets/README.md shows where images belong."
            )
    for record in _spread(records, MAX_CHECKED):
        try:
            mapper.check(record)
        except ValueError as error:
            raise ValueError(f"Data set {name!r}: {error}") from error


def _spread(records: Sequence[Record], limit: int) -> Iterator[Record]:
    count = min(limit, len(records))
    yield from (records[i * len(records) // count] for i in range(count))
