"""A repaired copy of an annotation file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fiber_d2.data.builtin import DETECTION

from .boxes import box_states, corners
from .checks import Finding
from .image_files import Facts, ImageTask, locate
from .schema import is_background, needed_lists
from .sources import Source
from .values import Box, Spans, as_box, as_size, as_spans, is_id

Entry = dict[str, Any]

# What is done, in the order of the report.
REPAIRS = {
    "image-dropped": "images dropped: file missing, unreadable or out of the image folder",
    "image-resized": "image sizes corrected to those of the files",
    "annotation-of-dropped-image": "annotations dropped with their image",
    "annotation-of-unknown-image": "annotations dropped: no such image",
    "annotation-of-unknown-category": "annotations dropped: no such class",
    "box-dropped": "annotations dropped: box empty, outside of the image or no finite numbers",
    "box-clipped": "boxes clipped to their image",
    "annotation-renumbered": "annotations given an id of their own",
    "category-dropped": "unused background categories dropped",
    "span-dropped": "spans dropped: empty, reversed or out of the caption",
    "span-clipped": "spans clipped to the end of the caption",
}


def repair(source: Source, facts: Facts) -> tuple[Any, Counter[str]]:
    """What a file should be, as far as that is certain.

    Args:
        source: with ``content``, which is not changed (what needs no repair is shared).
        facts: of the image files; those that were not read are taken to be as recorded.

    Returns:
        The repaired content, and how often each of ``REPAIRS`` was made.

    Raises:
        ValueError: the source is no file with the lists that its kind needs.
    """
    content = source.content
    lists = needed_lists(source)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in lists):
        raise ValueError(
            f"{source.label} cannot be repaired: it is no json object with the lists "
            f"{', '.join(lists)}."
        )
    counts: Counter[str] = Counter()
    images = list(_repair_images(source, facts, counts))
    listed = {i["id"] for i in content["images"] if isinstance(i, dict) and is_id(i.get("id"))}
    kept: dict[Any, Entry] = {}
    for image in images:
        if isinstance(image, dict) and is_id(image.get("id")):
            kept.setdefault(image["id"], image)  # the checks, too, take the first of an id
    entries = content.get("annotations")
    if not isinstance(entries, list):  # a file of images to be tested on
        return {**content, "images": images}, counts
    annotations = list(_linked(entries, listed, kept, counts))
    if source.kind == DETECTION:
        annotations = list(_of_known_class(annotations, content["categories"], counts))
    annotations = list(_repair_boxes(annotations, kept, counts))
    annotations = list(_renumber(annotations, counts))
    repaired = {**content, "images": images, "annotations": annotations}
    if source.kind == DETECTION:
        repaired["categories"] = _repair_categories(content["categories"], annotations, counts)
    else:
        repaired["images"] = [_repair_phrases(image, counts) for image in images]
        repaired["annotations"] = [_repair_tied(a, kept, counts) for a in annotations]
    return repaired, counts


def _repair_images(source: Source, facts: Facts, counts: Counter[str]) -> Iterator[Any]:
    for image in source.content["images"]:
        if not isinstance(image, dict) or not is_id(image.get("id")):
            yield image
            continue
        located = locate(image, source)
        fact = facts.get(located.key) if isinstance(located, ImageTask) else None
        if isinstance(located, Finding) or (fact is not None and fact.problem):
            counts["image-dropped"] += 1
            continue
        size = fact.size if fact is not None else None
        recorded = as_size(image)
        # Boxes of before an EXIF rotation would not fit the corrected size.
        if size is not None and recorded != size and recorded != fact.stored_size:
            counts["image-resized"] += 1
            image = {**image, "width": size[0], "height": size[1]}
        yield image


def _linked(
    entries: Iterable[Any], listed: set[Any], kept: dict[Any, Entry], counts: Counter[str]
) -> Iterator[Entry]:
    for annotation in entries:
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if is_id(image_id) and image_id in kept:
            yield annotation
        elif is_id(image_id) and image_id in listed:
            counts["annotation-of-dropped-image"] += 1
        else:
            counts["annotation-of-unknown-image"] += 1


def _of_known_class(
    annotations: Iterable[Entry], categories: Iterable[Any], counts: Counter[str]
) -> Iterator[Entry]:
    known = {c["id"] for c in categories if isinstance(c, dict) and is_id(c.get("id"))}
    for annotation in annotations:
        category_id = annotation.get("category_id")
        if is_id(category_id) and category_id in known:
            yield annotation
        else:
            counts["annotation-of-unknown-category"] += 1


def _repair_boxes(
    annotations: list[Entry], images: dict[Any, Entry], counts: Counter[str]
) -> Iterator[Entry]:
    given = [as_box(annotation.get("bbox")) for annotation in annotations]
    kept = [(a, box) for a, box in zip(annotations, given) if box is not None]
    counts["box-dropped"] += len(annotations) - len(kept)
    boxes = np.array([box for _, box in kept], dtype=np.float64).reshape(-1, 4)
    unknown = (float("nan"), float("nan"))
    sizes = [as_size(images[a["image_id"]]) or unknown for a, _ in kept]
    limits = np.array(sizes, dtype=np.float64).reshape(-1, 2)
    states = box_states(boxes, limits)
    low, high = corners(boxes)
    dropped = states.empty | states.outside
    partly = ((low < 0) | (high > limits)).any(axis=1)
    for index, (annotation, box) in enumerate(kept):
        if dropped[index]:
            counts["box-dropped"] += 1
        elif partly[index]:
            counts["box-clipped"] += 1
            yield _clipped(annotation, box, sizes[index])
        else:
            yield annotation


def _clipped(annotation: Entry, box: Box, size: tuple[float, float]) -> Entry:
    x, y = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[0] + box[2], size[0]), min(box[1] + box[3], size[1])
    changed = {"bbox": [x, y, right - x, bottom - y]}
    if "area" in annotation and not annotation.get("segmentation"):
        changed["area"] = (right - x) * (bottom - y)
    return {**annotation, **changed}


def _renumber(annotations: list[Entry], counts: Counter[str]) -> Iterator[Entry]:
    numbers = [a["id"] for a in annotations if is_id(a.get("id")) and not isinstance(a["id"], str)]
    free = max(0, int(max(numbers, default=0))) + 1
    seen: set[Any] = set()
    for annotation in annotations:
        own_id = annotation.get("id")
        if not is_id(own_id) or own_id in seen:
            counts["annotation-renumbered"] += 1
            own_id, free = free, free + 1
            annotation = {**annotation, "id": own_id}
        seen.add(own_id)
        yield annotation


def _repair_categories(
    categories: list[Any], annotations: Iterable[Entry], counts: Counter[str]
) -> list[Any]:
    used = {annotation["category_id"] for annotation in annotations}

    def unused_background(category: Any) -> bool:
        return (
            isinstance(category, dict)
            and is_background(category.get("name"))
            and is_id(category.get("id"))
            and category["id"] not in used
        )

    kept = [category for category in categories if not unused_background(category)]
    if not kept:
        return categories
    counts["category-dropped"] += len(categories) - len(kept)
    return kept


def _repair_phrases(image: Any, counts: Counter[str]) -> Any:
    """An image entry with mended ``tokens_positive_eval``; the number of phrases stays."""
    phrases = image.get("tokens_positive_eval") if isinstance(image, dict) else None
    if not isinstance(phrases, list) or not isinstance(image.get("caption"), str):
        return image
    mended = [_mended(phrase, image["caption"], counts) for phrase in phrases]
    return image if mended == phrases else {**image, "tokens_positive_eval": mended}


def _repair_tied(annotation: Entry, images: dict[Any, Entry], counts: Counter[str]) -> Entry:
    caption = images[annotation["image_id"]].get("caption")
    key = "tokens_positive" if "tokens_positive" in annotation else "tokens"
    if not isinstance(caption, str) or key not in annotation:
        return annotation
    mended = _mended(annotation[key], caption, counts)
    return annotation if mended == annotation[key] else {**annotation, key: mended}


def _mended(value: Any, caption: str, counts: Counter[str]) -> Any:
    """Spans inside of the caption; what is no list of spans stays as it is."""
    spans = as_spans(value)
    if spans is None:
        return value
    mended: Spans = []
    for begin, end in spans:
        if not 0 <= begin < min(end, len(caption)):
            counts["span-dropped"] += 1
            continue
        counts["span-clipped"] += end > len(caption)
        mended.append((begin, min(end, len(caption))))
    return [list(span) for span in mended]
