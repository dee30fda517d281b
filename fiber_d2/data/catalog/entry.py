"""What one row of the table of built-in data sets says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Kinds of ground truth: they decide how an image is asked about.
DETECTION, GROUNDING, REFEXP = "detection", "grounding", "refexp"
# Formats of annotation files: they decide who reads them.
COCO, LVIS, MDETR, TSV = "coco", "lvis", "mdetr", "tsv"


@dataclass(frozen=True)
class BuiltinDataset:
    """One row of the table; paths are relative to the folder of all data sets.

    Args:
        file_format: "coco", "lvis", "mdetr" or "tsv".
        ground_truth: "detection", "grounding" or "refexp".
        evaluator_type: name of the evaluator, None for what is only trained on.
        json_file: annotation file (for "tsv" its yaml file).
        image_root: image folder, or several, of which the first that exists is used.
        coco_image_root: the same for images that a file of mixed origin marks as COCO's.
        prepare: one or two sentences on where the annotation file comes from, for the message
            that it is missing.
        annotated: whether the file has annotations at all.
        entities_root: folder of Flickr30k Entities, which its evaluator reads.
        split: name of the split in that folder.
        classes: names that the published file gives its classes.
        prompts: class name to the ``prefix``, ``name`` and ``suffix`` of its published prompt.
    """

    file_format: str
    ground_truth: str
    evaluator_type: str | None
    json_file: str
    image_root: str | tuple[str, ...] = ()
    coco_image_root: str | tuple[str, ...] = ()
    prepare: str = ""
    annotated: bool = True
    entities_root: str | None = None
    split: str | None = None
    classes: tuple[str, ...] | None = None
    prompts: Mapping[str, Mapping[str, Any]] | None = None
