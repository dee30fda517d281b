"""The built-in data sets as a table, and the way to add one's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from .readers import load_detection_json, load_grounding_json

logger = logging.getLogger(__name__)

DETECTION, GROUNDING, REFEXP = "detection", "grounding", "refexp"
READERS = {
    DETECTION: load_detection_json,
    GROUNDING: load_grounding_json,
    REFEXP: load_grounding_json,
}


@dataclass(frozen=True)
class BuiltinDataset:
    """One row of the table; paths are relative to the folder of all data sets."""

    ground_truth: str
    evaluator_type: str
    json_file: str
    image_root: str
    entities_root: str | None = None
    split: str | None = None


def _shapes(split: str) -> dict[str, BuiltinDataset]:
    images, annotations = f"shapes/images/{split}", "shapes/annotations"
    return {
        f"shapes_detection_{split}": BuiltinDataset(
            DETECTION, "coco", f"{annotations}/instances_{split}.json", images
        ),
        f"shapes_grounding_{split}": BuiltinDataset(
            GROUNDING,
            "flickr",
            f"{annotations}/final_flickr_separateGT_{split}.json",
            images,
            entities_root="shapes/flickr30k_entities",
            split=split,
        ),
        f"shapes_refexp_{split}": BuiltinDataset(
            REFEXP, "refexp", f"{annotations}/finetune_shapes_{split}.json", images
        ),
    }


BUILTIN: dict[str, BuiltinDataset] = {**_shapes("train"), **_shapes("val")}


def register_all_builtin(root: str | None = None) -> None:
    """Register every row of the table. No file is read before a data set is used.

    Args:
        root: folder of all data sets; by default that of the environment variable
            ``DETECTRON2_DATASETS``, or ``./datasets``. A second call with another root moves them.
    """
    root = os.path.expanduser(root or os.getenv("DETECTRON2_DATASETS", "datasets"))
    for name, dataset in BUILTIN.items():
        metadata: dict[str, Any] = {}
        if dataset.entities_root is not None:
            metadata["entities_root"] = os.path.join(root, dataset.entities_root)
            metadata["split"] = dataset.split
        _register(
            name,
            os.path.join(root, dataset.json_file),
            os.path.join(root, dataset.image_root),
            ground_truth=dataset.ground_truth,
            evaluator_type=dataset.evaluator_type,
            **metadata,
        )


def register_coco_json(
    name: str, json_file: str, image_root: str, *, evaluator_type: str = "coco"
) -> None:
    """Register one's own COCO-format detection data under ``name``.

    Nothing else has to be said about the data: class names and ids are read from the file when it
    is used. Calling it again with other paths replaces the earlier ones.

    Raises:
        ValueError: ``name`` already belongs to a data set that was registered elsewhere.
    """
    _register(
        name,
        os.path.expanduser(json_file),
        os.path.expanduser(image_root),
        ground_truth=DETECTION,
        evaluator_type=evaluator_type,
    )


def _register(name: str, json_file: str, image_root: str, **metadata: Any) -> None:
    # The marker tells our entries, which may be replaced, from anybody else's.
    metadata.update(json_file=json_file, image_root=image_root, registered_by="fiber_d2")
    if name in DatasetCatalog.list():
        present = MetadataCatalog.get(name)
        if all(present.get(key) == value for key, value in metadata.items()):
            return
        if present.get("registered_by") != "fiber_d2":
            raise ValueError(f"The data set name {name!r} is taken by other data; choose another.")
        logger.info("The data set %s now reads %s", name, json_file)
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    read: Callable[..., list[dict]] = READERS[metadata["ground_truth"]]
    DatasetCatalog.register(name, partial(read, json_file, image_root, name))
    MetadataCatalog.get(name).set(**metadata)
