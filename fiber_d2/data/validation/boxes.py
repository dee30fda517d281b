"""Boxes: four numbers, of some extent, inside of their image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .checks import Finding
from .schema import id_of, where
from .sources import Item, blocks
from .values import Box, as_box, as_size, is_number, show

_BLOCK = 4096
# Exporters round, and count the last pixel in or not.
TOLERANCE = 1.0
_NO_SIZE = (float("nan"), float("nan"))


class BoxStates(NamedTuple):
    """What is wrong with each of ``N`` boxes; bool ``(N,)``, at most one is true."""

    empty: np.ndarray
    outside: np.ndarray
    beyond: np.ndarray


def corners(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(N, 2)`` upper left and lower right corners of XYWH boxes ``(N, 4)``."""
    with np.errstate(over="ignore"):  # infinitely far is outside as well
        return boxes[:, :2], boxes[:, :2] + boxes[:, 2:]


def box_states(boxes: np.ndarray, sizes: np.ndarray, tolerance: float = TOLERANCE) -> BoxStates:
    """
    Args:
        boxes: ``(N, 4)`` XYWH, pixels.
        sizes: ``(N, 2)`` width and height of each box's image; NaN where unknown.
        tolerance: pixels that a box may reach beyond its image.
    """
    low, high = corners(boxes)
    empty = (high <= low).any(axis=1)
    outside = ~empty & ((low >= sizes) | (high <= 0)).any(axis=1)
    over = (low < -tolerance) | (high > sizes + tolerance)
    return BoxStates(empty, outside, ~empty & ~outside & over.any(axis=1))


def check_boxes(items: Iterable[Item]) -> Iterator[Finding]:
    """Boxes that are none, empty, outside of the image as recorded, crowds, or of odd areas."""
    for block in blocks(items, _BLOCK):
        places: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        boxes: list[Box] = []
        sizes: list[tuple[float, float]] = []
        for image, entries in block:
            size = as_size(image) or _NO_SIZE
            for index, annotation in enumerate(entries):
                place = {**where(image), "annotation_id": id_of(annotation, index)}
                if annotation.get("iscrowd"):
                    yield Finding("box-crowd", f"iscrowd {show(annotation['iscrowd'])}", **place)
                box = as_box(annotation.get("bbox"))
                if box is None:
                    yield Finding("box-entry", f"bbox {show(annotation.get('bbox'))}", **place)
                    continue
                places.append(place)
                annotations.append(annotation)
                boxes.append(box)
                sizes.append(size)
        yield from _geometry(places, boxes, sizes)
        yield from _areas(places, annotations, boxes)


def _geometry(
    places: list[dict[str, Any]], boxes: list[Box], sizes: list[tuple[float, float]]
) -> Iterator[Finding]:
    states = box_states(_array(boxes, 4), _array(sizes, 2))
    for index in np.flatnonzero(states.empty):
        yield Finding("box-empty", f"bbox {_numbers(boxes[index])}", **places[index])
    for check, mask in (("box-outside", states.outside), ("box-beyond", states.beyond)):
        for index in np.flatnonzero(mask):
            width, height = sizes[index]
            text = f"bbox {_numbers(boxes[index])} in an image of {width} x {height}"
            yield Finding(check, text, **places[index])


def _areas(
    places: list[dict[str, Any]], annotations: list[dict[str, Any]], boxes: list[Box]
) -> Iterator[Finding]:
    """The area of a mask is at most that of its box; without a mask it is that of the box."""
    given = [index for index, annotation in enumerate(annotations) if "area" in annotation]
    areas = np.array(
        [float(a) if is_number(a := annotations[i]["area"]) else np.nan for i in given]
    )
    masked = np.array([bool(annotations[i].get("segmentation")) for i in given], dtype=bool)
    extents = _array([boxes[i] for i in given], 4)[:, 2:]
    with np.errstate(over="ignore", invalid="ignore"):
        whole = extents.prod(axis=1)
        slack = np.abs(extents).sum(axis=1) + 1  # a border of a pixel
        fits = (areas >= 0) & (areas <= whole + slack) & (masked | (areas >= whole - slack))
    for at in np.flatnonzero(~fits & (extents > 0).all(axis=1)):
        index = given[at]
        text = f"area {show(annotations[index]['area'])} of the bbox {_numbers(boxes[index])}"
        yield Finding("box-area", text, **places[index])


def _array(rows: list[Any], width: int) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(-1, width)


def _numbers(box: Box) -> str:
    return "[" + ", ".join(f"{number:.10g}" for number in box) + "]"
