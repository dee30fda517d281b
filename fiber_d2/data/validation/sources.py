"""What is to be validated: an annotation file, or a name of the catalogue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from fiber_d2.data.builtin import DETECTION, GROUNDING, REFEXP
from fiber_d2.data.catalog.entry import COCO, LVIS
from fiber_d2.data.categories import ClassNames
from fiber_d2.data.class_prompts import ClassPrompts
from fiber_d2.data.coco_json import existing_root, require_file
from fiber_d2.data.records import check_registered, ground_truth_kind

from .checks import Finding

KINDS = (DETECTION, GROUNDING, REFEXP)
T = TypeVar("T")


class Item(NamedTuple):
    """One image entry with its annotations, in the form of the json (boxes XYWH)."""

    image: dict[str, Any]
    annotations: list[dict[str, Any]]


@dataclass
class Contents:
    """What the other checks look at.

    Attributes:
        items: images with their annotations; of a file, in its order. May be iterated repeatedly,
            but of records each iteration reads them anew.
        images: those of ``items``, without annotations.
        classes: id and name of each class, in the order of the contiguous ids.
        findings: of the schema.
    """

    items: Iterable[Item] = ()
    images: list[dict[str, Any]] = field(default_factory=list)
    num_images: int = 0
    num_annotations: int = 0
    classes: list[tuple[Any, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass
class Source:
    """One data set.

    Attributes:
        label: names it in reports.
        kind: "detection", "grounding" or "refexp".
        file_format: "lvis" where image files are named by urls; otherwise it does not matter.
        image_root: folder of the images, None where the records hold whole paths.
        coco_image_root: the same for images whose ``data_source`` is "coco", if it is another.
        json_file: the annotation file, None for records.
        content: the decoded json file.
        records: Detectron2's dicts, of a data set without a json file. May be made lazily.
        annotated: whether a file must have annotations.
        class_names: of records; of a file, names that replace its own.
        prompts: words around the classes, by class name or in order, see ``ClassPrompts``.
        published_classes: the prompts are for a file of these classes only; None for any.
        broken: why there is neither content nor records.
    """

    label: str
    kind: str
    file_format: str = COCO
    image_root: str | None = None
    coco_image_root: str | None = None
    json_file: str | None = None
    content: Any = None
    records: Sequence[dict[str, Any]] | None = None
    annotated: bool = True
    class_names: ClassNames | None = None
    prompts: ClassPrompts | None = None
    published_classes: Sequence[str] | None = None
    broken: str | None = None


def source_of_json(
    json_file: str, image_root: str, *, kind: str | None = None, with_masks: bool = False
) -> Source:
    """Read an annotation file.

    Args:
        kind: None for "grounding" where an image has a caption, else "detection".
        with_masks: keep ``segmentation``, most of a file, whole; otherwise it becomes a bool.

    Raises:
        FileNotFoundError: there is no such file. One that is no json is a ``broken`` source.
        ValueError: the kind is unknown.
    """
    _check_kind(kind)
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(f"The annotation file {json_file} does not exist.")
    content = broken = None
    try:
        with PathManager.open(json_file, "r", encoding="utf-8") as file:
            content = json.load(file, object_hook=None if with_masks else _shrink_mask)
    except (ValueError, RecursionError) as error:  # bad json, bad utf-8, endless brackets
        broken = f"{json_file} is not json: {error}"
    return Source(
        label=os.path.basename(json_file),
        kind=kind or (GROUNDING if _any_image_has(content, "caption") else DETECTION),
        file_format=LVIS if _any_image_has(content, "neg_category_ids") else COCO,
        image_root=image_root,
        json_file=json_file,
        content=content,
        broken=broken,
    )


def source_of_dataset(name: str, *, kind: str | None = None, with_masks: bool = False) -> Source:
    """A registered data set: its json file where the metadata name one, else its records.

    Args:
        kind: None for the metadata's ``ground_truth``, or a guess where they have none.
        with_masks: as of :func:`source_of_json`.

    Raises:
        KeyError: the name is not registered.
        FileNotFoundError: its annotations do not exist; says where they belong.
        ValueError: the kind is unknown.
    """
    check_registered(name)
    metadata, loader = MetadataCatalog.get(name), DatasetCatalog[name]
    kind = kind or metadata.get("ground_truth")
    _check_kind(kind)
    if not metadata.get("json_file"):
        return _source_of_records(name, kind)
    require_file(metadata.json_file, name)
    source = source_of_json(
        metadata.json_file, metadata.get("image_root", ""), kind=kind, with_masks=with_masks
    )
    source.label = name
    if metadata.get("image_roots"):
        source.image_root = existing_root(metadata.image_roots)
    if metadata.get("coco_image_roots"):
        source.coco_image_root = existing_root(metadata.coco_image_roots)
    if metadata.get("file_format", metadata.get("evaluator_type")) == LVIS:
        source.file_format = LVIS
    # What the package's own entries know besides.
    options = getattr(loader, "options", {})
    source.annotated = options.get("annotated", True)
    source.class_names = options.get("class_names")
    source.prompts = getattr(loader, "prompts", None)
    source.published_classes = getattr(loader, "published_classes", None)
    return source


def _source_of_records(name: str, kind: str | None) -> Source:
    try:
        records = DatasetCatalog.get(name)
        kind = kind or ground_truth_kind(name, records)
    except (ValueError, AssertionError) as error:  # Detectron2's own readers assert
        return Source(name, kind or DETECTION, broken=str(error))
    names = MetadataCatalog.get(name).get("thing_classes") or []
    return Source(name, kind, records=records, class_names=list(names))


def blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def _check_kind(kind: str | None) -> None:
    if kind is not None and kind not in KINDS:
        raise ValueError(f"The kind {kind!r} is none of {', '.join(KINDS)}.")


def _any_image_has(content: Any, key: str) -> bool:
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and any(
        isinstance(image, dict) and key in image for image in images
    )


def _shrink_mask(entry: dict[str, Any]) -> dict[str, Any]:
    # While parsing, so that the polygons of one annotation at a time are in memory.
    if "segmentation" in entry:
        entry["segmentation"] = bool(entry["segmentation"])
    return entry
