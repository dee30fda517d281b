"""Registers the built-in data sets, and one's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .catalog import BUILTIN, DETECTION, GROUNDING, REFEXP, BuiltinDataset
from .catalog.entry import COCO, LVIS, MDETR, TSV
from .categories import ClassNames
from .class_prompts import (
    ClassPrompts,
    has_published_classes,
    plain_class_names,
    plain_prompts,
    prompts_in_order,
)
from .coco_json import ImageRoot, require_file
from .readers import load_detection_json, load_grounding_json, load_lvis_json, set_metadata

__all__ = [
    "BUILTIN",
    "DETECTION",
    "GROUNDING",
    "REFEXP",
    "register_all_builtin",
    "register_coco_json",
]

logger = logging.getLogger(__name__)


def register_all_builtin(root: str | None = None) -> None:
    """Register every row of the table. No data set is looked at before it is used.

    A name that somebody else has registered before stays theirs; a warning says so.

    Args:
        root: folder of all data sets; by default that of the environment variable
            ``DETECTRON2_DATASETS``, or ``./datasets``. A second call with another root moves them.
    """
    root = os.path.expanduser(root or os.getenv("DETECTRON2_DATASETS", "datasets"))
    for name, dataset in BUILTIN.items():
        loader, metadata = _builtin(name, dataset, root)
        try:
            _register(loader, metadata)
        except ValueError as error:
            logger.warning("%s The built-in data set of that name is left out.", error)


def register_coco_json(
    name: str,
    json_file: str,
    image_root: str,
    *,
    evaluator_type: str = "coco",
    class_names: ClassNames | None = None,
    prompts: ClassPrompts | None = None,
) -> None:
    """Register one's own COCO-format detection data under ``name``.

    Nothing else has to be said about the data: class names and ids are read from the file when it
    is used. Calling it again with other arguments replaces the earlier ones.

    Args:
        name: of the data set.
        json_file: annotation file, see :func:`~fiber_d2.data.load_detection_json`.
        image_root: folder that its file names are relative to.
        evaluator_type: name of the evaluator.
        class_names: other names than the file's: for all classes in order, or by category id.
        prompts: how to ask for the classes, see ``ClassPrompts``. They are checked, and stored as
            ``prompts`` in the metadata, in the order of the classes, when the file is read.

    Raises:
        ValueError: ``name`` already belongs to a data set that was registered elsewhere, or
            ``class_names`` or ``prompts`` are malformed.
    """
    options: dict[str, Any] = {}
    if class_names is not None:
        options["class_names"] = plain_class_names(class_names)
    loader = _Loader(
        name,
        COCO,
        os.path.expanduser(json_file),
        os.path.expanduser(image_root),
        options,
        plain_prompts(prompts),
    )
    _register(loader, {"ground_truth": DETECTION, "evaluator_type": evaluator_type})


def _load_tsv(json_file: str, image_root: ImageRoot, dataset_name: str) -> Sequence[dict[str, Any]]:
    from .tsv import load_tsv_dataset

    require_file(json_file, dataset_name)
    return load_tsv_dataset(json_file, dataset_name)


_READERS: dict[str, Callable[..., Sequence[dict[str, Any]]]] = {
    COCO: load_detection_json,
    LVIS: load_lvis_json,
    MDETR: load_grounding_json,
    TSV: _load_tsv,
}


@dataclass(frozen=True)
class _Loader:
    """What the catalogue calls for the records of a data set. Equal ones read the same."""

    name: str
    file_format: str
    json_file: str
    image_root: ImageRoot
    options: Mapping[str, Any] = field(default_factory=dict)
    prompts: ClassPrompts | None = None
    published_classes: Sequence[str] | None = None

    def __call__(self) -> Sequence[dict[str, Any]]:
        read = _READERS[self.file_format]
        records = read(self.json_file, self.image_root, self.name, **self.options)
        names = MetadataCatalog.get(self.name).get("thing_classes", [])
        as_published = self.published_classes is None or has_published_classes(
            self.published_classes, names, self.name, self.json_file
        )
        if self.prompts is not None and as_published:
            set_metadata(self.name, prompts=prompts_in_order(self.prompts, names, self.name))
        return records


def _builtin(name: str, dataset: BuiltinDataset, root: str) -> tuple[_Loader, dict[str, Any]]:
    """The loader and the metadata of a row of the table."""

    def under_root(folder: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(folder, str):
            return os.path.join(root, folder)
        return tuple(os.path.join(root, part) for part in folder)

    options: dict[str, Any] = {}
    if dataset.coco_image_root:
        options["coco_image_root"] = under_root(dataset.coco_image_root)
    if not dataset.annotated:
        options["annotated"] = False
    loader = _Loader(
        name,
        dataset.file_format,
        os.path.join(root, dataset.json_file),
        under_root(dataset.image_root),
        options,
        dataset.prompts,
        dataset.classes,
    )
    metadata = {
        "ground_truth": dataset.ground_truth,
        "evaluator_type": dataset.evaluator_type,
        "prepare": dataset.prepare,
    }
    if dataset.entities_root is not None:
        metadata["entities_root"] = os.path.join(root, dataset.entities_root)
        metadata["split"] = dataset.split
    return loader, metadata


def _register(loader: _Loader, metadata: dict[str, Any]) -> None:
    name = loader.name
    metadata = {**metadata, **_files(loader)}
    if name in DatasetCatalog.list():
        present, known = DatasetCatalog[name], MetadataCatalog.get(name)
        if not isinstance(present, _Loader):
            raise ValueError(f"The data set name {name!r} is taken by other data; choose another.")
        if present == loader and all(known.get(key) == value for key, value in metadata.items()):
            return
        logger.info("The data set %s now reads %s", name, loader.json_file)
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(**metadata)


def _files(loader: _Loader) -> dict[str, Any]:
    """What the metadata tell of files. Evaluators read the json, tools look for the images."""
    if loader.file_format == TSV:
        return {"file_format": TSV, "yaml_file": loader.json_file}
    roots = loader.image_root if isinstance(loader.image_root, tuple) else (loader.image_root,)
    files = {
        "file_format": loader.file_format,
        "json_file": loader.json_file,
        "image_root": roots[0],
    }
    if len(roots) > 1:
        files["image_roots"] = roots
    if "coco_image_root" in loader.options:
        files["coco_image_roots"] = loader.options["coco_image_root"]
    return files
