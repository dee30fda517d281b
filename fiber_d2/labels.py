"""Boxes and their labels on a picture of any size: measured, placed, then drawn."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from fiber_d2.colors import Color

LABEL_INK: Color = (15, 15, 15)
_RIM: Color = (0, 0, 0)
# Pixels of letters: below the first one cannot read them.
_SMALLEST_LETTERS = 7
_DOTS = "..."
# A label is no wider than this many times the size of its letters, about 28 characters.
_WIDEST = 17
_MAX_LINES = 2


@dataclass(frozen=True)
class Label:
    """A text where it is to stand.

    Attributes:
        lines: of text.
        letters: size of the letters, in pixels.
        place: int XYXY ``(4,)``, in pixels of the picture.
    """

    lines: tuple[str, ...]
    letters: int
    place: np.ndarray


def letter_size(side: int) -> int:
    """Pixels of the letters on a picture whose longer side is ``side`` pixels.

    Larger pictures are looked at from further away, but not by as much as they are larger.
    """
    return max(9, round(8 + 0.009 * side))


def line_width(side: int) -> int:
    """Pixels of the lines of boxes on a picture whose longer side is ``side`` pixels."""
    return max(1 if side < 200 else 2, round(side / 350))


@functools.lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib ships, so that pictures look the same on every machine."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def line_height(size: int) -> int:
    """Pixels from one line to the next."""
    return sum(font(size).getmetrics())


def wrap(text: str, size: int, width: float, max_lines: int) -> list[str]:
    """Lines of at most ``width`` pixels; what does not fit ends in dots.

    Words are cut only where one is wider than a line.
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(size).getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < max_lines:
            lines.append(word)
        else:
            while " " in lines[-1] and font(size).getlength(f"{lines[-1]} {_DOTS}") > width:
                lines[-1] = lines[-1].rpartition(" ")[0]
            lines[-1] += f" {_DOTS}"
            break
    return [_cut(line, size, width) for line in lines]


def layout_labels(
    boxes: np.ndarray,
    texts: Sequence[str],
    notes: Sequence[str],
    picture_size: tuple[int, int],
    letters: int,
) -> list[Label]:
    """Where labels stand: inside of the picture, near their boxes, and not on each other.

    A label covers part of another only where the picture has no room for it any more, in the
    order of the boxes. Letters become smaller where a word is wider than the picture.

    Args:
        boxes: ``(N, 4)`` XYXY.
        texts: N, shortened to two lines.
        notes: N, such as scores: they stand behind the texts, and are not shortened.
        picture_size: (width, height).
        letters: size of the letters in pixels.
    """
    labels: list[Label] = []
    placed = np.zeros((0, 4))
    for box, text, note in zip(np.asarray(boxes, np.float64).reshape(-1, 4), texts, notes):
        lines, size = _fit(text, note, picture_size, letters)
        pad = _pad(size)
        width = max((font(size).getlength(line) for line in lines), default=0)
        extent = (
            min(math.ceil(width) + 2 * pad, picture_size[0]),
            min(line_height(size) * len(lines) + 2 * (pad // 2), picture_size[1]),
        )
        place = place_label(box, extent, picture_size, placed)
        placed = np.concatenate([placed, place[None]])
        labels.append(Label(tuple(lines), size, place))
    return labels


def place_label(
    box: np.ndarray,
    extent: tuple[int, int],
    picture_size: tuple[int, int],
    placed: np.ndarray,
) -> np.ndarray:
    """The place of a label that covers the least of those already there.

    At the box if there is one that covers none: above, below, inside at a corner, at a side. Else
    the nearest free place of the picture. Else where the least is covered.

    Args:
        box: XYXY ``(4,)``.
        extent: (width, height) of the label, no larger than the picture.
        picture_size: (width, height).
        placed: ``(N, 4)`` XYXY, labels already there.

    Returns:
        int XYXY ``(4,)``, inside of the picture.
    """
    width, height = extent
    room = np.subtract(picture_size, extent)
    x1, y1, x2, y2 = box
    wanted = np.array(
        [
            (x1, y1 - height),
            (x1, y2),
            (x2 - width, y1 - height),
            (x2 - width, y2),
            (x1, y1),
            (x2 - width, y2 - height),
            (x2, y1),
            (x1 - width, y1),
        ]
    )
    # Being pushed back into the picture moves a label off its place; count that, a little.
    near = np.clip(np.rint(wanted), 0, room)
    moved = np.abs(near - wanted).sum(axis=1) + np.arange(len(near))
    covered = _covered(near, extent, placed)
    if covered.min() == 0:
        return _rectangle(near[np.where(covered == 0, moved, np.inf).argmin()], extent)
    # If there is room anywhere, there is where the label touches others or the borders.
    xs = np.unique(np.concatenate([[0, room[0]], placed[:, 2], placed[:, 0] - width]))
    ys = np.unique(np.concatenate([[0, room[1]], placed[:, 3], placed[:, 1] - height]))
    xs, ys = xs[(xs >= 0) & (xs <= room[0])], ys[(ys >= 0) & (ys <= room[1])]
    corners = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    gaps = np.maximum(np.maximum(corners - [x2, y2], [x1, y1] - (corners + extent)), 0)
    corners = np.concatenate([near, corners])
    distance = np.concatenate([moved, np.hypot(*gaps.T)])
    covered = np.concatenate([covered, _covered(corners[len(near) :], extent, placed)])
    return _rectangle(corners[np.lexsort((distance, covered))[0]], extent)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    words: Sequence[str],
    notes: Sequence[str],
    colors: Mapping[str, Color],
) -> np.ndarray:
    """The image with its boxes and their labels, sized for the image.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        boxes: ``(N, 4)`` XYXY; what is outside of the image is drawn at its border.
        words: N texts.
        notes: N texts behind the words, such as scores; may be empty.
        colors: RGB of each text of ``words``.

    Returns:
        uint8 RGB ``(H, W, 3)``.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    boxes = np.nan_to_num(np.asarray(boxes, np.float64)).reshape(-1, 2, 2)
    # Corners in order and inside, whoever they come from.
    boxes = np.clip(np.sort(boxes, axis=1), 0, [width - 1, height - 1]).reshape(-1, 4)
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    thick = line_width(side)
    # Large ones first: small ones stay visible, and of equal ones the first, which is the best.
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    for index in np.lexsort((-np.arange(len(boxes)), -areas)).tolist():
        _draw_box(pen, boxes[index], colors[words[index]], thick, (width, height))
    labels = layout_labels(boxes, words, notes, (width, height), letter_size(side))
    for label, box, word in zip(labels, boxes, words):
        _draw_leader(pen, label.place, box, colors[word], max(1, thick // 2))
    for label, word in zip(labels, words):
        picture.paste(_label_image(label, colors[word]), tuple(label.place[:2].tolist()))
    return np.asarray(picture)


def _fit(
    text: str, note: str, picture_size: tuple[int, int], letters: int
) -> tuple[list[str], int]:
    """Lines that fit the picture, in letters as large as they can be; and their size."""
    for size in range(letters, _SMALLEST_LETTERS - 1, -1):
        longest = max((font(size).getlength(word) for word in text.split()), default=0)
        room = picture_size[0] - 2 * _pad(size)
        width = min(room, max(_WIDEST * size, longest))
        lines = wrap(text, size, width, _MAX_LINES)
        if note:
            behind = f"{lines[-1]} {note}" if lines else note
            if font(size).getlength(behind) <= width:
                lines[-1:] = [behind]
            else:
                lines.append(_cut(note, size, width))
        most = (picture_size[1] - 2 * (_pad(size) // 2)) // line_height(size)
        if longest <= room and len(lines) <= most:
            break
    return lines[: max(1, most)], size


def _cut(line: str, size: int, width: float) -> str:
    """The line, without the letters that do not fit."""
    if font(size).getlength(line) <= width:
        return line
    while line and font(size).getlength(line + _DOTS) > width:
        line = line[:-1]
    return line.rstrip() + _DOTS


def _pad(size: int) -> int:
    """Pixels left and right of a label's text; above and below half of them."""
    return max(2, round(size / 4))


def _covered(corners: np.ndarray, extent: tuple[int, int], placed: np.ndarray) -> np.ndarray:
    """Area of ``placed`` under a label at each of the corners ``(M, 2)``."""
    ends = corners + np.asarray(extent)
    sides = np.minimum(ends[:, None], placed[None, :, 2:]) - np.maximum(
        corners[:, None], placed[None, :, :2]
    )
    return np.prod(np.clip(sides, 0, None), axis=2).sum(axis=1)


def _rectangle(corner: np.ndarray, extent: tuple[int, int]) -> np.ndarray:
    return np.concatenate([corner, corner + np.asarray(extent)]).astype(np.int64)


def _draw_box(
    pen: ImageDraw.ImageDraw,
    box: np.ndarray,
    color: Color,
    thick: int,
    picture_size: tuple[int, int],
) -> None:
    """The lines lie on the sides of the box, with a dark rim for grounds of their own colour."""
    for extra, ink in ((1, _RIM), (0, color)):
        half = (thick - 1) / 2 + extra
        low = np.maximum(np.floor(box[:2] - half), 0)
        high = np.minimum(np.ceil(box[2:] + half), np.asarray(picture_size) - 1)
        pen.rectangle((*low.tolist(), *high.tolist()), outline=ink, width=thick + 2 * extra)


def _draw_leader(
    pen: ImageDraw.ImageDraw, place: np.ndarray, box: np.ndarray, color: Color, thick: int
) -> None:
    """A line to the box from a label that found no place beside it."""
    middle = (np.maximum(place[:2], box[:2]) + np.minimum(place[2:], box[2:])) / 2
    start = np.clip(middle, place[:2], place[2:])
    end = np.clip(middle, box[:2], box[2:])
    if np.abs(start - end).max() > 2 * thick + 2:
        line = (*start.tolist(), *end.tolist())
        pen.line(line, fill=_RIM, width=thick + 2)
        pen.line(line, fill=color, width=thick)


def _label_image(label: Label, color: Color) -> Image.Image:
    # An image of its own, so that no letter leaves the label.
    width, height = (label.place[2:] - label.place[:2]).tolist()
    image = Image.new("RGB", (width, height), color)
    pen = ImageDraw.Draw(image)
    pad = _pad(label.letters)
    for number, line in enumerate(label.lines):
        top = pad // 2 + number * line_height(label.letters)
        pen.text((pad, top), line, fill=LABEL_INK, font=font(label.letters))
    return image
