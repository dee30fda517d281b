"""Image files: there, whole, of the recorded size, and not in two splits."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from PIL import Image

from .checks import Finding
from .image_files import Facts, ImageFact, ImageTask, locate
from .schema import where
from .sources import Source
from .values import as_size, show

Entry = dict[str, Any]


def check_paths(images: Iterable[Entry], source: Source) -> Iterator[Finding]:
    """File names that lead out of the image folder."""
    for image in images:
        located = locate(image, source)
        if isinstance(located, Finding):
            yield located


def check_images(images: Iterable[Entry], source: Source, facts: Facts) -> Iterator[Finding]:
    """Compare the entries with what was read; images that were not read are passed over."""
    for image in images:
        task = locate(image, source)
        fact = facts.get(task.key) if isinstance(task, ImageTask) else None
        if fact is not None:
            yield from _compare(image, fact)


def _compare(image: dict[str, Any], fact: ImageFact) -> Iterator[Finding]:
    place = where(image)
    if fact.problem or fact.size is None:
        if fact.problem:
            yield Finding(fact.problem, fact.message, **place)
        return
    recorded = as_size(image)
    if recorded == fact.size or recorded is None:  # None has been reported by the schema
        pass
    elif recorded == fact.stored_size:
        yield Finding(
            "image-rotated-size",
            f"recorded {_wh(recorded)}, but EXIF orientation {fact.orientation} makes it "
            f"{_wh(fact.size)}: save the file without, or turn boxes and size",
            **place,
        )
    else:
        yield Finding(
            "image-size", f"recorded {_wh(recorded)}, the file has {_wh(fact.size)}", **place
        )
    if fact.orientation != 1:
        yield Finding(
            "image-rotated",
            f"EXIF orientation {fact.orientation}: the boxes must be those of the turned image",
            **place,
        )
    limit = Image.MAX_IMAGE_PIXELS
    if limit and fact.size[0] * fact.size[1] > limit:
        yield Finding("image-huge", f"{_wh(fact.size)} pixels", **place)


def _wh(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def check_duplicates(
    splits: Sequence[tuple[Source, Iterable[Entry]]], facts: Facts
) -> Iterator[Finding]:
    """Images of a split that an earlier one has, by file and, where read, by content."""
    by_file: dict[Hashable, tuple[str, Any]] = {}
    by_digest: dict[bytes, tuple[str, Any]] = {}
    if len(splits) < 2:
        return
    for source, images in splits:
        own_files: dict[Hashable, tuple[str, Any]] = {}
        own_digests: dict[bytes, tuple[str, Any]] = {}
        for image in images:
            task = locate(image, source)
            if not isinstance(task, ImageTask):
                continue
            key = task.key if task.record is not None else os.path.realpath(task.path)
            if key in own_files:
                continue  # another caption of the same image
            own_files[key] = (source.label, image["id"])
            digest = facts[task.key].digest if task.key in facts else b""
            if digest:
                own_digests.setdefault(digest, (source.label, image["id"]))
            if key in by_file:
                found, check = by_file[key], "duplicate-file"
            elif digest and digest in by_digest:
                found, check = by_digest[digest], "duplicate-content"
            else:
                continue
            yield Finding(
                check,
                f"it is in {found[0]} as well, as image {show(found[1])}",
                **where(image),
                source=source.label,
            )
        by_file = {**own_files, **by_file}
        by_digest = {**own_digests, **by_digest}
