"""LVIS ground truth and detections as arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from fiber_d2.data.categories import require
from fiber_d2.evaluation.records import Record
from fiber_d2.evaluation.saved import read_records
from fiber_d2.files import replacing

# Detections written to a file at a time.
_ROWS_AT_ONCE = 100_000


@dataclass(frozen=True)
class LVISGroundTruth:
    """What an LVIS file says of I images, K classes and G objects.

    Attributes:
        image_ids: the file's ids, ascending; "image" elsewhere is an index into it.
        category_ids: the file's ids, ascending; "category" elsewhere is an index into it.
        frequencies: per class "r" (rare), "c" (common), "f" (frequent), None if the file is silent.
        annotated: whether the file has annotations at all.
        image: int64 ``(G,)``, the image of each object.
        category: int64 ``(G,)``, its class.
        boxes: float64 ``(G, 4)``, XYWH in pixels.
        area: float64 ``(G,)``, pixels of the object (of its mask, not of its box).
        ignore: bool ``(G,)``, objects that may, but need not, be found.
        negative: int64, ``pair()`` of each image and class known not to be in it.
        not_exhaustive: int64, ``pair()`` of each image and class of which it may show more objects
            than are annotated.
    """

    image_ids: Sequence[int]
    category_ids: Sequence[int]
    frequencies: Sequence[str | None]
    annotated: bool
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    area: np.ndarray
    ignore: np.ndarray
    negative: np.ndarray
    not_exhaustive: np.ndarray

    def pair(self, image: np.ndarray, category: np.ndarray) -> np.ndarray:
        """One number, int64, for an image and a class."""
        return image.astype(np.int64) * len(self.category_ids) + category


@dataclass(frozen=True)
class LVISDetections:
    """N detections. Rows of an image and class with equal scores rank in order of appearance.

    Attributes:
        image: int32 ``(N,)``, index into the ground truth's ``image_ids``.
        category: int32 ``(N,)``, index into its ``category_ids``.
        boxes: float32 or float64 ``(N, 4)``, XYWH in pixels, continuous (no pixel is added).
        scores: ``(N,)`` of the same type.
    """

    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Any) -> LVISDetections:
        return LVISDetections(
            self.image[rows], self.category[rows], self.boxes[rows], self.scores[rows]
        )

    @classmethod
    def empty(cls) -> LVISDetections:
        return cls(
            np.zeros(0, np.int32),
            np.zeros(0, np.int32),
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.float32),
        )

    @classmethod
    def concatenate(cls, parts: Iterable[LVISDetections]) -> LVISDetections:
        parts = list(parts) or [cls.empty()]
        return cls(
            np.concatenate([part.image for part in parts]),
            np.concatenate([part.category for part in parts]),
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
        )


Detections = Union[str, os.PathLike, Sequence[Record]]
"""A result file, or its content: ``{"image_id", "category_id", "bbox" (XYWH), "score"}``."""


def parse_lvis(content: Mapping[str, Any], source: str = "of the ground truth") -> LVISGroundTruth:
    """The ground truth of a parsed LVIS file. Objects without area are left out, as in LVIS.

    Args:
        source: names the file in messages.

    Raises:
        ValueError: an entry lacks what LVIS files have, or names an unknown image or class.
    """
    annotated = content.get("annotations") is not None
    lists = ("neg_category_ids", "not_exhaustive_category_ids") if annotated else ()
    images = _by_id(content, "images", ("id", *lists), source)
    categories = _by_id(content, "categories", ("id",), source)
    image_index = {image_id: index for index, image_id in enumerate(images)}
    category_index = {category_id: index for index, category_id in enumerate(categories)}

    def pairs(key: str) -> np.ndarray:
        found = [
            image_index[image["id"]] * len(categories) + category_index[category_id]
            for image in images.values()
            for category_id in image.get(key) or ()
            if category_id in category_index
        ]
        return np.unique(np.asarray(found, dtype=np.int64))

    annotations = content.get("annotations") or []
    for annotation in annotations:
        require(annotation, ("image_id", "category_id", "bbox", "area"), "annotation", source)
        for key, index in (("image_id", image_index), ("category_id", category_index)):
            if annotation[key] not in index:
                raise ValueError(
                    f"The annotation {annotation.get('id')} of the annotation file {source} has "
                    f"the {key} {annotation[key]!r}, which the file does not list."
                )
    try:
        area = np.asarray([a["area"] for a in annotations], dtype=np.float64).reshape(-1)
        boxes = np.asarray([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Not every annotation of the annotation file {source} has 4 numbers as bbox and one "
            f"as area ({error})."
        ) from error
    images_of = np.asarray([image_index[a["image_id"]] for a in annotations], dtype=np.int64)
    categories_of = np.asarray([category_index[a["category_id"]] for a in annotations], np.int64)
    kept = has_area(area)
    return LVISGroundTruth(
        image_ids=tuple(images),
        category_ids=tuple(categories),
        frequencies=tuple(category.get("frequency") for category in categories.values()),
        annotated=annotated,
        image=images_of[kept],
        category=categories_of[kept],
        boxes=boxes[kept],
        area=area[kept],
        ignore=np.asarray([bool(a.get("ignore", 0)) for a in annotations], dtype=bool)[kept],
        negative=pairs("neg_category_ids"),
        not_exhaustive=pairs("not_exhaustive_category_ids"),
    )


def has_area(area: np.ndarray) -> np.ndarray:
    """Whether boxes or objects take part at all, bool of the same shape."""
    return (area > 0) & (area < np.inf)


def parse_detections(truth: LVISGroundTruth, detections: Detections) -> LVISDetections:
    """Detections in the format of COCO's and LVIS's result files.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or is no such list; a detection of an
            unknown image or class.
    """
    source = "the detections"
    if isinstance(detections, (str, os.PathLike)):
        source = os.fspath(detections)
        detections = read_records(source)
    image_index = {image_id: index for index, image_id in enumerate(truth.image_ids)}
    category_index = {category_id: index for index, category_id in enumerate(truth.category_ids)}
    try:
        image = [image_index.get(d["image_id"], -1) for d in detections]
        category = [category_index.get(d["category_id"], -1) for d in detections]
        boxes = np.asarray([d["bbox"] for d in detections], dtype=np.float64).reshape(-1, 4)
        scores = np.asarray([d["score"] for d in detections], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Not every entry of {source} has image_id, category_id, bbox (4 numbers) and score "
            f"({type(error).__name__}: {error})."
        ) from error
    for key, found in (("image_id", image), ("category_id", category)):
        if -1 in found:
            raise ValueError(
                f"{found.count(-1)} of {len(found)} detections of {source} have an {key} that the "
                f"ground truth does not have, for example {detections[found.index(-1)][key]!r}. "
                "Do they belong to another data set?"
            )
    return LVISDetections(
        np.asarray(image, dtype=np.int32), np.asarray(category, dtype=np.int32), boxes, scores
    )


def write_detections(
    truth: LVISGroundTruth, detections: LVISDetections, path: str | os.PathLike[str]
) -> None:
    """Write a result file, image by image; ``path`` never holds half of it.

    Rows become text some at a time: there may be millions, and as dicts they take some twenty
    times the memory.
    """
    order = np.argsort(detections.image, kind="stable")
    with replacing(path) as file:
        file.write(b"[")
        for start in range(0, len(order), _ROWS_AT_ONCE):
            part = detections[order[start : start + _ROWS_AT_ONCE]]
            file.write(b", " if start else b"")
            file.write(json.dumps(_records(truth, part))[1:-1].encode())
        file.write(b"]")


def _records(truth: LVISGroundTruth, detections: LVISDetections) -> list[Record]:
    columns = (detections.image, detections.category, detections.boxes, detections.scores)
    return [
        {
            "image_id": truth.image_ids[image],
            "category_id": truth.category_ids[category],
            "bbox": box,
            "score": score,
        }
        for image, category, box, score in zip(*(column.tolist() for column in columns))
    ]


def _by_id(
    content: Mapping[str, Any], kind: str, keys: Sequence[str], source: str
) -> dict[Any, dict[str, Any]]:
    """The entries of a list by ascending id."""
    if not isinstance(content.get(kind), list):
        raise ValueError(f"The annotation file {source} lacks the list {kind!r}.")
    entries: dict[Any, dict[str, Any]] = {}
    for entry in content[kind]:
        require(entry, keys, "image" if kind == "images" else "category", source)
        if entry["id"] in entries:
            raise ValueError(
                f"The annotation file {source} repeats the id {entry['id']} of {kind}."
            )
        entries[entry["id"]] = entry
    return dict(sorted(entries.items(), key=lambda item: item[0]))
