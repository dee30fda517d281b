"""Augmentations that Detectron2 does not have: the original's sizes, and captions that flip."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.data import transforms as T

_SIDE = re.compile(r"\b(left|right)(most)?\b", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "right": "left"}


class ResizeShortestEdgeTruncated(T.ResizeShortestEdge):
    """Detectron2's ResizeShortestEdge with the original's arithmetic.

    The short edge gets the drawn length (a smaller one where the long edge would exceed
    ``max_size``), the long edge is cut, not rounded, to whole pixels, so sizes differ from
    Detectron2's by up to a pixel. Arguments are those of ResizeShortestEdge.
    """

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        if self.is_range:
            size = int(np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1))
        else:
            size = int(np.random.choice(self.short_edge_length))
        new_height, new_width = self.get_output_shape(height, width, size, self.max_size)
        return T.ResizeTransform(height, width, new_height, new_width, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """``(height, width)`` after resizing an image of ``oldh`` x ``oldw`` pixels."""
        short, long = min(oldh, oldw), max(oldh, oldw)
        size = short_edge_length
        if long / short * size > max_size:
            size = round(max_size * short / long)
        if short == size:
            return oldh, oldw
        if oldw < oldh:
            return int(size * oldh / oldw), size
        return size, int(size * oldw / oldh)


def count_horizontal_flips(transform: T.Transform) -> int:
    """How many times a transform, or list of transforms, mirrors the image left to right."""
    if isinstance(transform, T.TransformList):
        return sum(count_horizontal_flips(part) for part in transform.transforms)
    return int(isinstance(transform, T.HFlipTransform))


def swap_left_right_words(
    caption: str, spans: Iterable[Sequence[int]]
) -> tuple[str, list[list[int]]]:
    """The caption of the mirrored image: left and right (leftmost, rightmost) change places.

    Only whole words are exchanged, in their case, and spans move with the words.

    Args:
        caption: the sentence.
        spans: ``(begin, end)`` characters of it.

    Returns:
        The new caption and the spans of the same words in it.
    """
    matches = list(_SIDE.finditer(caption))
    swapped = _SIDE.sub(lambda match: _swapped(match[1]) + (match[2] or ""), caption)
    begins = np.array([match.start(1) for match in matches], dtype=np.int64)
    ends = np.array([match.end(1) for match in matches], dtype=np.int64)
    growth = np.array([len(_swapped(match[1])) for match in matches], dtype=np.int64)
    growth -= ends - begins

    def moved(position: int) -> int:
        # A border within an exchanged word stays within it; those behind move by what it grew.
        shift = int(growth[ends <= position].sum())
        for k in np.flatnonzero((begins < position) & (position < ends)):
            shift += min(0, int(ends[k] + growth[k] - position))
        return position + shift

    return swapped, [[moved(int(begin)), moved(int(end))] for begin, end in spans]


def _swapped(word: str) -> str:
    other = _OTHER_SIDE[word.lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


def mirror_caption(record: dict[str, Any]) -> None:
    """Exchange left and right in the caption of a record, in place, with all its spans."""
    caption = record["caption"]

    def moved(spans: Iterable[Sequence[int]]) -> list[list[int]]:
        return swap_left_right_words(caption, spans)[1]

    record["caption"] = swap_left_right_words(caption, ())[0]
    for annotation in record.get("annotations", ()):
        if "tokens_positive" in annotation:
            annotation["tokens_positive"] = moved(annotation["tokens_positive"])
    if "tokens_positive_eval" in record:
        record["tokens_positive_eval"] = [moved(s) for s in record["tokens_positive_eval"]]
