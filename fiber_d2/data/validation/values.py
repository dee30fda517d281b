"""What counts as an id, a size, a box, a text or a list of spans in an annotation file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fiber_d2.data import coco_json
from fiber_d2.text.prompts import shorten

Box = tuple[float, float, float, float]
Spans = list[tuple[int, int]]


def is_number(value: Any) -> bool:
    """Whether it is a finite number; ``True`` and ``False`` are none."""
    return not isinstance(value, bool) and coco_json.is_number(value)


def is_id(value: Any) -> bool:
    """Whether it can be an id: a whole number or a text."""
    return type(value) in (int, str)


def is_text(value: Any) -> bool:
    """Whether it is a string that can be encoded; json may hold halves of surrogate pairs."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def as_size(image: dict[str, Any]) -> tuple[int, int] | None:
    """``(width, height)`` of an image entry or record, None where they are no positive pixels."""
    sides = image.get("width"), image.get("height")
    # Beyond 2**31 it is no size, but could overflow.
    if all(is_number(side) and 1 <= side < 2**31 and side == int(side) for side in sides):
        return int(sides[0]), int(sides[1])
    return None


def as_box(value: Any) -> Box | None:
    """A bbox, None where it is not a list of four finite numbers."""
    if isinstance(value, (list, tuple)) and len(value) == 4 and all(map(is_number, value)):
        return tuple(value)
    return None


def as_spans(value: Any) -> Spans | None:
    """The spans of one phrase, None where they are no list of pairs of integers."""
    if not isinstance(value, (list, tuple)):
        return None
    for pair in value:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            return None
        # Larger ones than any caption could overflow array arithmetic later.
        if not all(type(border) is int and abs(border) < 2**31 for border in pair):
            return None
    return [(begin, end) for begin, end in value]


def whole_caption(caption: str) -> tuple[int, int]:
    """The characters of a referring expression: all but the outer spaces."""
    return len(caption) - len(caption.lstrip()), len(caption.rstrip())


def mark_spans(caption: str, spans: Sequence[tuple[int, int]]) -> str:
    """The caption with brackets around each span, as ``a [red circle] and two dogs``.

    Borders outside of the caption are drawn at its ends; nested spans show nested brackets.
    """
    inserted: dict[int, list[str]] = {}
    for begin, end in sorted(set(spans)):
        begin, end = (min(max(border, 0), len(caption)) for border in (begin, end))
        inserted.setdefault(begin, []).append("[" if begin < end else "[]")
        if begin < end:
            inserted.setdefault(end, []).insert(0, "]")
    pieces, last = [], 0
    for position in sorted(inserted):
        pieces += [caption[last:position], *inserted[position]]
        last = position
    return "".join([*pieces, caption[last:]])


def show(value: Any) -> str:
    """A value for a message, cut where it is long."""
    return shorten(repr(value), 80)
