"""Annotation files -> Detectron2 dataset dicts.

Both formats are COCO json underneath. Detectron2's ``load_coco_json`` is not used: it sorts the
categories, whose order decides the caption, it drops boxes whose polygon is faulty, and it accepts
files without annotations.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

BACKGROUND = "__background__"
# Copied from an image of a grounding file into its record, where present.
GROUNDING_KEYS = (
    "sentence_id",
    "original_img_id",
    "original_id",
    "dataset_name",
    "tokens_positive_eval",
)


def load_detection_json(
    json_file: str, image_root: str, dataset_name: str | None = None
) -> list[dict[str, Any]]:
    """Records of a COCO instances file.

    The contiguous ids are 0-based positions in the file's ``categories``; an entry called
    ``__background__`` is left out together with its boxes.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the file names are relative to.
        dataset_name: where given, ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` are
            stored in its metadata.

    Returns:
        One record per image in ascending order of ids: ``file_name``, ``height``, ``width``,
        ``image_id`` and ``annotations`` with ``bbox`` (XYWH_ABS pixels), ``category_id``
        (contiguous) and ``iscrowd``. Images without annotations are kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not COCO json, or an image lies outside of ``image_root``.
    """
    content = _load(json_file, dataset_name, ("images", "annotations", "categories"))
    categories = [c for c in content["categories"] if c.get("name") != BACKGROUND]
    for category in categories:
        _require(category, ("id", "name"), "category", json_file)
    contiguous = {category["id"]: index for index, category in enumerate(categories)}
    if len(contiguous) != len(categories) or not categories:
        problem = "repeats an id in its" if categories else "has no"
        raise ValueError(f"The annotation file {json_file} {problem} categories.")
    known = {category["id"] for category in content["categories"]}
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).set(
            thing_classes=[category["name"] for category in categories],
            thing_dataset_id_to_contiguous_id=contiguous,
        )
    records = []
    for image, entries in _images(content, json_file):
        record = _image_record(image, image_root, json_file)
        for annotation in entries:
            category_id = annotation.get("category_id")
            if category_id not in known:
                raise ValueError(
                    f"The annotation {annotation.get('id')} of {json_file} has the category id "
                    f"{category_id!r}, which is not among the file's categories."
                )
            if category_id in contiguous:
                box = _box(annotation, json_file)
                record["annotations"].append({**box, "category_id": contiguous[category_id]})
        records.append(record)
    return records


def load_grounding_json(
    json_file: str, image_root: str, dataset_name: str | None = None
) -> list[dict[str, Any]]:
    """Records of an MDETR-style file: each "image" is one sentence about an image.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the file names are relative to.
        dataset_name: named in messages.

    Returns:
        Records as of :func:`load_detection_json` (``category_id`` is 0) with ``caption`` (str),
        per annotation ``tokens_positive`` (list of ``[begin, end)`` characters) and those of
        ``sentence_id``, ``original_img_id``, ``original_id``, ``dataset_name`` and
        ``tokens_positive_eval`` that the image has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of that format, or an image lies outside of ``image_root``.
    """
    content = _load(json_file, dataset_name, ("images", "annotations"))
    records = []
    for image, entries in _images(content, json_file):
        _require(image, ("caption",), "image", json_file)
        record = _image_record(image, image_root, json_file)
        record["caption"] = image["caption"]
        record.update({key: image[key] for key in GROUNDING_KEYS if image.get(key) is not None})
        for annotation in entries:
            spans = annotation.get("tokens_positive", annotation.get("tokens"))
            if spans is None:
                raise ValueError(
                    f"The annotation {annotation.get('id')} of {json_file} has no tokens_positive: "
                    "the [begin, end) characters of the caption that name its box."
                )
            box = _box(annotation, json_file)
            record["annotations"].append({**box, "category_id": 0, "tokens_positive": spans})
        records.append(record)
    return records


def _load(json_file: str, dataset_name: str | None, lists: Iterable[str]) -> dict[str, Any]:
    whose = f" of the data set {dataset_name!r}" if dataset_name else ""
    if not PathManager.isfile(json_file):
        prepare = (
            "python -m fiber_d2.data.shapes writes the generated sets; "
            if dataset_name and dataset_name.startswith("shapes_")
            else ""
        )
        raise FileNotFoundError(
            f"The annotation file {json_file}{whose} does not exist: {prepare}"
            "datasets/README.md shows where each data set belongs, and the environment variable "
            "DETECTRON2_DATASETS names the folder that holds them all (default: ./datasets)."
        )
    try:
        with PathManager.open(json_file, "r", encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:  # bad json as well as bad utf-8
        raise ValueError(f"The annotation file {json_file}{whose} is not json: {error}") from error
    lists = tuple(lists)
    found = content if isinstance(content, dict) else {}
    missing = [key for key in lists if not isinstance(found.get(key), list)]
    if missing:
        raise ValueError(
            f"The annotation file {json_file}{whose} is not COCO json: it needs an object with the "
            f"lists {', '.join(lists)}, but lacks {', '.join(missing)}."
        )
    logger.info("Read %d images from %s", len(content["images"]), json_file)
    return content


def _images(content: Mapping[str, Any], json_file: str) -> list[tuple[dict, list[dict]]]:
    """Each image with its annotations, in ascending order of image ids."""
    by_id: dict[Any, dict] = {}
    for image in content["images"]:
        _require(image, ("id", "file_name", "height", "width"), "image", json_file)
        if by_id.setdefault(image["id"], image) is not image:
            raise ValueError(f"The annotation file {json_file} has two images of id {image['id']}.")
    per_image = defaultdict(list)
    for annotation in content["annotations"]:
        _require(annotation, ("image_id", "bbox"), "annotation", json_file)
        if annotation["image_id"] not in by_id:
            raise ValueError(
                f"The annotation {annotation.get('id')} of {json_file} belongs to the image "
                f"{annotation['image_id']!r}, which is not among the file's images."
            )
        per_image[annotation["image_id"]].append(annotation)
    try:
        order = sorted(by_id)
    except TypeError as error:
        raise ValueError(f"The image ids of {json_file} mix numbers and text.") from error
    return [(by_id[image_id], per_image[image_id]) for image_id in order]


def _require(entry: Any, keys: Iterable[str], kind: str, json_file: str) -> None:
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        which = f" {entry['id']!r}" if isinstance(entry, dict) and "id" in entry else ""
        raise ValueError(
            f"The annotation file {json_file} is not COCO json: the {kind}{which} lacks "
            f"{', '.join(missing)}."
        )


def _image_record(image: Mapping[str, Any], image_root: str, json_file: str) -> dict[str, Any]:
    name = os.path.normpath(image["file_name"])
    # Compared as written: links that the owner of the folder made inside it are welcome.
    if os.path.isabs(name):
        outside = not name.startswith(os.path.join(os.path.abspath(image_root), ""))
    else:
        outside = name.split(os.sep)[0] == os.pardir
    if outside:
        raise ValueError(
            f"The image {image['id']!r} of {json_file} has the file name {image['file_name']!r}, "
            f"which leads out of its image folder {image_root}."
        )
    return {
        "file_name": os.path.join(image_root, name),
        "height": image["height"],
        "width": image["width"],
        "image_id": image["id"],
        "annotations": [],
    }


def _box(annotation: Mapping[str, Any], json_file: str) -> dict[str, Any]:
    box = annotation["bbox"]
    if not (isinstance(box, list) and len(box) == 4):
        raise ValueError(
            f"The annotation {annotation.get('id')} of {json_file} has the bbox {box!r} instead of "
            "[x, y, width, height]."
        )
    return {
        "bbox": box,
        "bbox_mode": BoxMode.XYWH_ABS,
        "iscrowd": annotation.get("iscrowd", 0),
    }
