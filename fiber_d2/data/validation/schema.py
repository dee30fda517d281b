"""Lists, entries and ids: from raw content to images with their annotations."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import Any

from fiber_d2.data.builtin import DETECTION, REFEXP
from fiber_d2.data.catalog.entry import LVIS
from fiber_d2.data.categories import read_categories
from fiber_d2.data.readers import end_of_url

from .checks import ERROR, Finding
from .sources import Contents, Item, Source
from .values import as_size, is_id, is_text, show


def read_json_contents(source: Source) -> Contents:
    """Take a file apart, collecting everything that is wrong with its structure."""
    contents = Contents()
    contents.findings.extend(_take_apart(source, contents))
    return contents


def needed_lists(source: Source) -> tuple[str, ...]:
    """The lists that a source's file must have."""
    annotations = ("annotations",) if source.annotated else ()
    return ("images", *annotations, *(("categories",) if source.kind == DETECTION else ()))


def file_name_of(image: dict[str, Any], source: Source) -> str | None:
    """The file name of an image entry or record, None where it has no usable one.

    LVIS names the file by the last two parts of a url.
    """
    url = image.get("coco_url")
    name = end_of_url(url) if source.file_format == LVIS and url else image.get("file_name")
    usable = is_text(name) and "\0" not in name and os.path.normpath(name) != os.curdir
    return name if usable else None


def is_background(name: Any) -> bool:
    """Whether a category's name says that it is no class."""
    return isinstance(name, str) and name.strip(" _").lower() == "background"


def _take_apart(source: Source, contents: Contents) -> Iterator[Finding]:
    content = source.content if isinstance(source.content, dict) else {}
    needed = needed_lists(source)
    missing = [key for key in needed if not isinstance(content.get(key), list)]
    if missing:
        yield Finding(
            "lists",
            f"the file must be an object with the lists {', '.join(needed)}; it lacks "
            f"{', '.join(missing)}",
        )
    names = ("images", "annotations", "categories")
    lists = {key: content[key] if isinstance(content.get(key), list) else [] for key in names}
    contents.num_images = len(lists["images"])
    contents.num_annotations = len(lists["annotations"])
    by_id: dict[Any, Item] = {}
    yield from _images(lists["images"], by_id, source)
    if not by_id and "images" not in missing:
        yield Finding("no-images", "the file lists no usable image")
    yield from _annotations(lists["annotations"], by_id)
    contents.items = list(by_id.values())
    contents.images = [item.image for item in contents.items]
    if source.kind == DETECTION and "categories" not in missing:
        problems = list(_categories(lists["categories"]))
        yield from problems
        yield from _classes(source, contents, problems)
        yield from _category_use(lists["categories"], contents, source.annotated)
    if source.annotated:
        for item in contents.items:
            yield from check_count(item, source.kind)


def _category_use(
    categories: Sequence[Any], contents: Contents, annotated: bool
) -> Iterator[Finding]:
    known = {c["id"] for c in categories if isinstance(c, dict) and is_id(c.get("id"))}
    used: set[Any] = set()
    for item in contents.items:
        yield from check_category(item, known, used)
    if annotated:
        yield from unused_classes(contents, used)


def _images(entries: Sequence[Any], by_id: dict[Any, Item], source: Source) -> Iterator[Finding]:
    kinds: Counter[bool] = Counter()
    for index, image in enumerate(entries):
        image_id = image.get("id") if isinstance(image, dict) else None
        if not is_id(image_id):
            what = show(image) if not isinstance(image, dict) else f"the id {show(image_id)}"
            yield Finding("image-entry", f"entry {index} of images has {what}")
            continue
        kinds[isinstance(image_id, str)] += 1
        if image_id in by_id:
            yield Finding(
                "image-id-repeated",
                f"entry {index} of images ({show(image.get('file_name'))}) has the id of "
                f"{show(by_id[image_id].image.get('file_name'))}",
                image_id=image_id,
            )
            continue
        by_id[image_id] = Item(image, [])
        yield from check_image_keys(image, source)
    if len(kinds) == 2:
        yield Finding(
            "image-ids-mixed", f"{kinds[False]} image ids are numbers, {kinds[True]} are text"
        )


def check_image_keys(image: dict[str, Any], source: Source) -> Iterator[Finding]:
    """File name and size of an image entry."""
    if file_name_of(image, source) is None:
        text = f"the file_name is {show(image.get('file_name'))}"
        if source.file_format == LVIS:
            text += f", the coco_url {show(image.get('coco_url'))}"
        yield Finding("image-entry", text, image_id=image["id"])
    elif as_size(image) is None:
        text = f"width {show(image.get('width'))}, height {show(image.get('height'))}"
        yield Finding("image-size-entry", text, **where(image))


def _annotations(entries: Sequence[Any], by_id: dict[Any, Item]) -> Iterator[Finding]:
    seen: dict[Any, int] = {}
    for index, annotation in enumerate(entries):
        if not isinstance(annotation, dict):
            yield Finding("annotation-entry", f"entry {index} of annotations is {show(annotation)}")
            continue
        own_id = annotation.get("id")
        if not is_id(own_id):
            yield Finding(
                "annotation-id-missing", f"entry {index} of annotations has the id {show(own_id)}"
            )
            own_id = None
        elif own_id in seen:
            yield Finding(
                "annotation-id-repeated",
                f"entries {seen[own_id]} and {index} of annotations",
                annotation_id=own_id,
            )
        else:
            seen[own_id] = index
        image_id = annotation.get("image_id")
        if not is_id(image_id):
            yield Finding(
                "annotation-entry", f"the image_id is {show(image_id)}", annotation_id=own_id
            )
        elif image_id not in by_id:
            yield Finding(
                "unknown-image",
                f"no image has the id {show(image_id)}{_other_type(image_id, by_id)}",
                annotation_id=own_id,
            )
        else:
            by_id[image_id].annotations.append(annotation)


def _other_type(key: Any, known: Container[Any]) -> str:
    """A hint where an id is there as text instead of a number, or the other way round."""
    as_number = isinstance(key, str) and key.isdecimal() and len(key) < 20
    twin = int(key) if as_number else str(key)
    if isinstance(twin, str) is isinstance(key, str) or twin not in known:
        return ""
    return f" ({show(twin)} is one: text and numbers are different ids)"


def _categories(entries: Sequence[Any]) -> Iterator[Finding]:
    by_id: dict[Any, Any] = {}
    by_name: dict[str, Any] = {}
    for index, category in enumerate(entries):
        category_id = category.get("id") if isinstance(category, dict) else None
        if not is_id(category_id):
            yield Finding(
                "category-entry", f"entry {index} of categories has no usable id: {show(category)}"
            )
            continue
        name = category.get("name")
        if category_id in by_id:
            yield Finding(
                "category-id-repeated",
                f"{show(by_id[category_id])} and {show(name)} have the id {show(category_id)}",
            )
        by_id.setdefault(category_id, name)
        if not is_text(name):
            yield Finding("category-entry", f"category {show(category_id)}: name {show(name)}")
            continue
        if is_background(name):
            yield Finding("category-background", f"category {show(category_id)}, {show(name)}")
        if name in by_name:
            yield Finding(
                "category-name-repeated",
                f"categories {show(by_name[name])} and {show(category_id)} are called "
                f"{show(name)}: words cannot tell them apart",
            )
        by_name.setdefault(name, category_id)


def _classes(source: Source, contents: Contents, problems: Sequence[Finding]) -> Iterator[Finding]:
    """Fill in the classes: those that the reader makes of the categories."""
    try:
        classes = read_categories(source.content, source.label, source.class_names or None)
    except (ValueError, AttributeError) as error:
        if not any(finding.level == ERROR for finding in problems):
            yield Finding("no-categories", str(error))
        return
    contents.classes = list(zip(classes.contiguous, classes.names))


def check_category(item: Item, known: Container[Any], used: set[Any]) -> Iterator[Finding]:
    """Whether the classes of an image's annotations are ``known``; adds them to ``used``."""
    for index, annotation in enumerate(item.annotations):
        category_id = annotation.get("category_id")
        if is_id(category_id) and category_id in known:
            used.add(category_id)
            continue
        hint = _other_type(category_id, known) if is_id(category_id) else ""
        yield Finding(
            "unknown-category",
            f"no category has the id {show(category_id)}{hint}",
            image_id=item.image["id"],
            annotation_id=id_of(annotation, index),
        )


def unused_classes(contents: Contents, used: Container[Any]) -> Iterator[Finding]:
    """Classes that no annotation has."""
    for category_id, name in contents.classes:
        if category_id not in used:
            yield Finding("category-unused", f"category {show(category_id)}, {show(name)}")


def check_count(item: Item, kind: str) -> Iterator[Finding]:
    """An image without a box, or an expression without the one it needs."""
    count = len(item.annotations)
    if count == 0:
        yield Finding("image-without-annotations", "no box", **where(item.image))
    if kind == REFEXP and count != 1:
        text = f"{count} boxes: scoring needs exactly one for each expression"
        yield Finding("expression-boxes", text, **where(item.image))


def where(image: dict[str, Any]) -> dict[str, Any]:
    """Id and file of an image, as arguments of a finding."""
    name = image.get("file_name")
    if "tsv_row" in image:
        name = f"{name}, row {image['tsv_row']}"
    return {"image_id": image["id"], "file_name": name if isinstance(name, str) else None}


def id_of(annotation: dict[str, Any], index: int) -> Any:
    """The id of an annotation; without one, its position among those of the image."""
    own_id = annotation.get("id")
    return own_id if is_id(own_id) else f"#{index}"
