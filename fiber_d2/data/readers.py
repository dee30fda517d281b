"""Annotation files -> Detectron2 dataset dicts.

All formats are COCO json underneath. Detectron2's ``load_coco_json`` is not used: it sorts the
categories, whose order decides the caption, it drops boxes whose polygon is faulty, and it accepts
files without annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from detectron2.data import MetadataCatalog

from .categories import BACKGROUND as BACKGROUND
from .categories import ClassNames, read_categories, require
from .coco_json import (
    ImageRoot,
    Record,
    annotations_of,
    box_of,
    existing_root,
    image_record,
    is_number,
    load_json,
    records_of,
)

# Copied from an image of a grounding file into its record, where present.
GROUNDING_KEYS = (
    "sentence_id",
    "original_img_id",
    "original_id",
    "dataset_name",
    "data_source",
    "tokens_positive_eval",
)
# Copied from an image of an LVIS file into its record: ids of the file, as Detectron2 has them.
LVIS_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")


def load_detection_json(
    json_file: str,
    image_root: ImageRoot,
    dataset_name: str | None = None,
    *,
    class_names: ClassNames | None = None,
    annotated: bool = True,
) -> list[Record]:
    """Records of a COCO instances file.

    The contiguous ids are 0-based positions in the file's ``categories``, whatever the ids are.
    No class are: an entry called ``__background__``, whose boxes are left out; and, where no
    annotation uses them, an entry called ``background`` or the one of id 0 that Roboflow puts
    before the classes to group them.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the file names are relative to, or several, see ``ImageRoot``.
        dataset_name: where given, ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` are
            stored in its metadata.
        class_names: other names for the classes: for all of them in order, or by category id.
        annotated: False accepts a file without the list ``annotations``, as test servers have.

    Returns:
        One record per image in ascending order of ids: ``file_name``, ``height``, ``width``,
        ``image_id`` and ``annotations`` with ``bbox`` (XYWH_ABS pixels), ``category_id``
        (contiguous) and ``iscrowd``. Images without annotations are kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not COCO json, or an image lies outside of ``image_root``.
    """
    root = existing_root(image_root)
    return _load_classes(
        json_file,
        dataset_name,
        lambda image: image_record(image, image["file_name"], root, json_file),
        class_names=class_names,
        annotated=annotated,
        image_keys=("file_name",),
    )


def load_lvis_json(
    json_file: str,
    image_root: ImageRoot,
    dataset_name: str | None = None,
    *,
    class_names: ClassNames | None = None,
    annotated: bool = True,
) -> list[Record]:
    """Records of an LVIS file, see :func:`load_detection_json`.

    The image file is given by the last two parts of ``coco_url``, such as
    ``train2017/000000000009.jpg``; ``file_name`` serves where there is no url.

    Returns:
        Records with, in addition, ``neg_category_ids`` and ``not_exhaustive_category_ids``: ids of
        the file, not contiguous ones, as in Detectron2's own records of LVIS. With
        ``dataset_name`` the metadata get ``class_frequency`` too: "r", "c" or "f" by contiguous
        id, None where the file does not tell.

    Raises:
        FileNotFoundError, ValueError: as of :func:`load_detection_json`.
    """
    root = existing_root(image_root)

    def record(image: Mapping[str, Any]) -> Record:
        found = image_record(image, _lvis_file_name(image, json_file), root, json_file)
        found.update({key: image[key] for key in LVIS_KEYS if image.get(key) is not None})
        return found

    return _load_classes(
        json_file,
        dataset_name,
        record,
        class_names=class_names,
        annotated=annotated,
        frequencies=True,
    )


def load_grounding_json(
    json_file: str,
    image_root: ImageRoot,
    dataset_name: str | None = None,
    *,
    coco_image_root: ImageRoot | None = None,
) -> list[Record]:
    """Records of an MDETR-style file: each "image" is one sentence about an image.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the file names are relative to, or several, see ``ImageRoot``.
        dataset_name: named in messages.
        coco_image_root: the same for images whose ``data_source`` is "coco".

    Returns:
        Records as of :func:`load_detection_json` (``category_id`` is 0) with ``caption`` (str),
        per annotation ``tokens_positive`` (list of ``[begin, end)`` characters) and those of
        ``sentence_id``, ``original_img_id``, ``original_id``, ``dataset_name``, ``data_source``
        and ``tokens_positive_eval`` that the image has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of that format, or an image lies outside of its folder.
    """
    root = existing_root(image_root)
    coco_root = root if coco_image_root is None else existing_root(coco_image_root)

    def record(image: Mapping[str, Any]) -> Record:
        if not isinstance(image["caption"], str):
            raise ValueError(
                f"The image {image['id']!r} of {json_file} has the caption {image['caption']!r}, "
                "which is no text."
            )
        folder = coco_root if image.get("data_source") == "coco" else root
        found = image_record(image, image["file_name"], folder, json_file)
        found["caption"] = image["caption"]
        found.update({key: image[key] for key in GROUNDING_KEYS if image.get(key) is not None})
        return found

    content = load_json(json_file, dataset_name, ("images", "annotations"))
    records = records_of(content, json_file, record, ("file_name", "caption"))
    for annotation, entries in annotations_of(content, json_file, records):
        spans = annotation.get("tokens_positive", annotation.get("tokens"))
        if spans is None:
            raise ValueError(
                f"The annotation {annotation.get('id')} of {json_file} has no tokens_positive: "
                "the [begin, end) characters of the caption that name its box."
            )
        if not _are_spans(spans):
            raise ValueError(
                f"The annotation {annotation.get('id')} of {json_file} has the tokens_positive "
                f"{spans!r} instead of a list of [begin, end) characters."
            )
        box = box_of(annotation, json_file)
        entries.append({**box, "category_id": 0, "tokens_positive": spans})
    return list(records.values())


def _load_classes(
    json_file: str,
    dataset_name: str | None,
    record: Callable[[Mapping[str, Any]], Record],
    *,
    class_names: ClassNames | None,
    annotated: bool,
    image_keys: Sequence[str] = (),
    frequencies: bool = False,
) -> list[Record]:
    """Records of a file whose annotations have categories."""
    needed = ("images", "annotations", "categories") if annotated else ("images", "categories")
    content = load_json(json_file, dataset_name, needed)
    classes = read_categories(content, json_file, class_names)
    if dataset_name is not None:
        metadata: dict[str, Any] = {
            "thing_classes": classes.names,
            "thing_dataset_id_to_contiguous_id": classes.contiguous,
        }
        if frequencies:
            metadata["class_frequency"] = classes.frequencies
        set_metadata(dataset_name, **metadata)
    records = records_of(content, json_file, record, image_keys)
    for annotation, entries in annotations_of(content, json_file, records):
        index = classes.index_of(annotation, json_file)
        if index is not None:
            entries.append({**box_of(annotation, json_file), "category_id": index})
    return list(records.values())


def set_metadata(dataset_name: str, **values: Any) -> None:
    """Store what a file says about its data set.

    Raises:
        ValueError: it said something else when it was read before.
    """
    metadata = MetadataCatalog.get(dataset_name)
    for key, value in values.items():
        if metadata.get(key, value) != value:
            raise ValueError(
                f"The data set {dataset_name!r} has other {key} than before: did its file change "
                "while the program ran? Start it anew, or register the file under another name."
            )
    metadata.set(**values)


def _lvis_file_name(image: Mapping[str, Any], json_file: str) -> str:
    url = image.get("coco_url")
    if not url:
        require(image, ("file_name",), "image", json_file)
        return image["file_name"]
    name = end_of_url(url)
    if name is None:
        raise ValueError(
            f"The image {image['id']!r} of {json_file} has the coco_url {url!r}, which does not "
            "end in a folder and a file name."
        )
    return name


def end_of_url(url: Any) -> str | None:
    """Folder and file name that a url ends in, None where it does not."""
    try:
        parts = urlsplit(url).path.split("/") if isinstance(url, str) else []
    except ValueError:  # brackets that hold no address
        return None
    return "/".join(parts[-2:]) if len(parts) > 1 and all(parts[-2:]) else None


def _are_spans(spans: Any) -> bool:
    return isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(map(is_number, span)) for span in spans
    )
