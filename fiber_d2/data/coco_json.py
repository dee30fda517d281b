"""COCO json: parsed leanly, checked entry by entry, with images that stay in their folder."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Union

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .categories import require

logger = logging.getLogger(__name__)

Record = dict[str, Any]
ImageRoot = Union[str, Sequence[str]]
"""An image folder, or several of which the first that exists is used."""


def existing_root(image_root: ImageRoot) -> str:
    """The first of several folders that exists; the first of all where none does."""
    if isinstance(image_root, str):
        return image_root
    return next(filter(PathManager.isdir, image_root), image_root[0])


def require_file(path: str, dataset_name: str | None = None) -> None:
    """
    Raises:
        FileNotFoundError: there is no such file; says where it belongs and what makes it.
    """
    if PathManager.isfile(path):
        return
    whose, prepare = _of(dataset_name), ""
    if dataset_name is not None and dataset_name in MetadataCatalog.list():
        prepare = MetadataCatalog.get(dataset_name).get("prepare") or ""
    raise FileNotFoundError(
        f"The annotation file {path}{whose} does not exist. {prepare}{' ' if prepare else ''}"
        "datasets/README.md shows where each data set belongs, and the environment variable "
        "DETECTRON2_DATASETS names the folder that holds them all (default: ./datasets)."
    )


def _of(dataset_name: str | None) -> str:
    return f" of the data set {dataset_name!r}" if dataset_name else ""


def load_json(json_file: str, dataset_name: str | None, lists: Sequence[str]) -> dict[str, Any]:
    """The parsed file, without masks.

    Raises:
        FileNotFoundError: as of :func:`require_file`.
        ValueError: it is no json object with these lists.
    """
    require_file(json_file, dataset_name)
    whose = _of(dataset_name)
    try:
        with PathManager.open(json_file, "r", encoding="utf-8") as file:
            content = json.load(file, object_hook=_without_masks)
    except (ValueError, RecursionError) as error:  # bad json, bad utf-8, endless brackets
        raise ValueError(f"The annotation file {json_file}{whose} is not json: {error}") from error
    found = content if isinstance(content, dict) else {}
    missing = [key for key in lists if not isinstance(found.get(key), list)]
    if missing:
        raise ValueError(
            f"The annotation file {json_file}{whose} is not COCO json: it needs an object with the "
            f"lists {', '.join(lists)}, but lacks {', '.join(missing)}."
        )
    logger.info("Read %d images from %s", len(content["images"]), json_file)
    return content


def _without_masks(entry: dict[str, Any]) -> dict[str, Any]:
    # Dropped while parsing: polygons are most of a file, and nobody here looks at them.
    entry.pop("segmentation", None)
    return entry


def _drain(entries: list[Any]) -> Iterator[Any]:
    """The entries in order, each freed as soon as its successor is asked for."""
    entries.reverse()
    while entries:
        yield entries.pop()


def records_of(
    content: dict[str, Any],
    json_file: str,
    make: Callable[[Mapping[str, Any]], Record],
    keys: Sequence[str],
) -> dict[Any, Record]:
    """Image id to record, in ascending order of ids; uses up ``images``.

    Args:
        make: the record of an image.
        keys: what each image must have besides its id and size.

    Raises:
        ValueError: an image lacks a key, or ids are repeated or of different types.
    """
    records: dict[Any, Record] = {}
    for image in _drain(content["images"]):
        require(image, ("id", *keys, "height", "width"), "image", json_file)
        if not isinstance(image["id"], (int, str)):
            raise ValueError(f"The annotation file {json_file} has the image id {image['id']!r}.")
        if image["id"] in records:
            raise ValueError(f"The annotation file {json_file} has two images of id {image['id']}.")
        records[image["id"]] = make(image)
    try:
        order = sorted(records)
    except TypeError as error:
        raise ValueError(f"The image ids of {json_file} mix numbers and text.") from error
    return {image_id: records[image_id] for image_id in order}


def annotations_of(
    content: dict[str, Any], json_file: str, records: Mapping[Any, Record]
) -> Iterator[tuple[dict[str, Any], list[Record]]]:
    """Each annotation with the list that it belongs into; uses up ``annotations``.

    Raises:
        ValueError: an annotation lacks its box or image.
    """
    for annotation in _drain(content.get("annotations") or []):
        require(annotation, ("image_id", "bbox"), "annotation", json_file)
        image_id = annotation["image_id"]
        record = records.get(image_id) if isinstance(image_id, (int, str)) else None
        if record is None:
            raise ValueError(
                f"The annotation {annotation.get('id')} of {json_file} belongs to the image "
                f"{image_id!r}, which is not among the file's images."
            )
        yield annotation, record["annotations"]


def path_within(root: str, name: str) -> str | None:
    """The path of a file name below ``root``; None where it leads out of it.

    Compared as written: links that the owner of the folder made inside it are welcome.
    """
    name = os.path.normpath(name)
    if os.path.isabs(name):
        outside = not name.startswith(os.path.join(os.path.abspath(root), ""))
    else:
        outside = name.split(os.sep)[0] == os.pardir
    return None if outside else os.path.join(root, name)


def image_record(
    image: Mapping[str, Any], file_name: Any, image_root: str, json_file: str
) -> Record:
    """A record without annotations.

    Raises:
        ValueError: the file lies outside of ``image_root``, or the size is none.
    """
    whose = f"The image {image['id']!r} of {json_file} has the file name {file_name!r}, which"
    if not isinstance(file_name, str) or "\0" in file_name:
        raise ValueError(f"{whose} is no file name.")
    if os.path.normpath(file_name) == os.curdir:
        raise ValueError(f"{whose} names no file.")
    path = path_within(image_root, file_name)
    if path is None:
        raise ValueError(f"{whose} leads out of its image folder {image_root}.")
    height, width = image["height"], image["width"]
    if not (is_number(height) and is_number(width) and height > 0 and width > 0):
        raise ValueError(
            f"The image {image['id']!r} of {json_file} has the height {height!r} and the width "
            f"{width!r}; both must be numbers of pixels."
        )
    return {
        "file_name": path,
        "height": height,
        "width": width,
        "image_id": image["id"],
        "annotations": [],
    }


def box_of(annotation: Mapping[str, Any], json_file: str) -> dict[str, Any]:
    """``bbox`` (XYWH_ABS, pixels), ``bbox_mode`` and ``iscrowd`` of an annotation.

    Raises:
        ValueError: the box is not four finite numbers.
    """
    box = annotation["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        raise ValueError(
            f"The annotation {annotation.get('id')} of {json_file} has the bbox {box!r} instead of "
            "[x, y, width, height]."
        )
    return {
        "bbox": box,
        "bbox_mode": BoxMode.XYWH_ABS,
        "iscrowd": annotation.get("iscrowd", 0),
    }


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
