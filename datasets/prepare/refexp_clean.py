"""A Mixed json without the images that RefCOCO, RefCOCO+ and RefCOCOg are evaluated on.

    python datasets/prepare/refexp_clean.py \\
        --mixed datasets/mdetr_annotations/final_mixed_train.json \\
        --exclude datasets/mdetr_annotations/finetune_refcoco_val.json \\
                  datasets/mdetr_annotations/finetune_refcoco_testA.json ... \\
        --image-data datasets/vg/image_data.json \\
        --output datasets/mdetr_annotations/final_mixed_train_refexpclean.json

--exclude takes the finetune json files of every val and test split, or REFER's refs files, of
which everything but the split "train" counts. Images are matched by their COCO id, whichever way
a file writes it: COCO_train2014_000000000123.jpg, 000000000123.jpg, or as original_id. Images of
Visual Genome are looked up in image_data.json, unless the Mixed json has their coco_id (mixed.py
writes it where it knows it). Annotations go with their images; ids stay as they are.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    fields,
    is_finished,
    progress,
    read_coco,
    read_json,
    report,
    run,
    script_parser,
    write_json,
)
from mixed import ImageData
from refer import read_refs

# COCO 2014 and 2017, and REFER's variant with the number of the annotation behind it.
_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:_\d+)?\.[A-Za-z]+")


def coco_id_of_name(file_name: str) -> int | None:
    """The COCO id in a file name, whatever folder is in front; None where it has no such form."""
    match = _COCO_NAME.fullmatch(file_name.replace("\\", "/").split("/")[-1])
    return int(match[1]) if match else None


def evaluated_images(path: Path) -> set[int]:
    """COCO ids of a finetune json, or of all splits of a refs file but "train".

    Raises:
        FileNotFoundError, ValueError: it is neither, holds no such image, or is about training.
    """
    if path.suffix == ".json" and isinstance(read_json(path), dict):
        if path.stem.endswith("_train"):
            raise ValueError(f"{path} holds training expressions: give val and test files only.")
        images = read_coco(path, "images")["images"]
        names = [coco_id_of_name(image.get("file_name", "")) for image in images]
        ids = {image.get("original_id", name) for image, name in zip(images, names)}
    else:
        ids = {ref["image_id"] for ref in read_refs(path) if ref["split"] != "train"}
    if not ids or not all(isinstance(value, int) for value in ids):
        raise ValueError(f"{path} does not give the COCO ids of images of val or test splits.")
    return ids


def coco_id_of(image: Mapping[str, Any], data: ImageData | None, where: str) -> int | None:
    """The COCO id of a Mixed image; None where COCO does not have it.

    Raises:
        ValueError: that cannot be told.
    """
    found = coco_id_of_name(image["file_name"])
    if found is not None:
        return found
    name = Path(image["file_name"]).stem
    source = image.get("data_source")
    if source == "coco":
        own = int(name) if name.isdecimal() else None
        for value in (own, image.get("original_id"), image.get("original_img_id")):
            if isinstance(value, int):
                return value
        raise ValueError(f"{where} is COCO's, but neither its name nor its original_id says which.")
    if "coco_id" in image:
        return image["coco_id"]
    if source is None:
        raise ValueError(f"{where} has no data_source: is it COCO's or Visual Genome's?")
    if data is None:
        raise ValueError(
            f"{where} is Visual Genome's, and whether COCO has it is unknown: give --image-data."
        )
    known = data.get(name)
    if known is None:
        raise ValueError(f"{where} is Visual Genome's, but {data.path} has no image {name}.")
    return known[2]


def clean(
    content: dict[str, Any], excluded: set[int], data: ImageData | None, path: Path
) -> Counter:
    """Removes the excluded images and their annotations; returns how many of what."""
    removed: dict[Any, int] = {}
    for image in progress(content["images"], "images"):
        image_id, _ = fields(image, ("id", "file_name"), f"An image of {path}")
        coco_id = coco_id_of(image, data, f"The image {image_id} of {path}")
        if coco_id in excluded:
            removed[image_id] = coco_id
    before = len(content["annotations"])
    content["images"] = [image for image in content["images"] if image["id"] not in removed]
    content["annotations"] = [
        entry for entry in content["annotations"] if entry.get("image_id") not in removed
    ]
    return Counter(
        {
            "COCO images of val and test": len(set(removed.values())),
            "captions about them": len(removed),
            "boxes of those": before - len(content["annotations"]),
        }
    )


def work(args: argparse.Namespace) -> None:
    if is_finished(args.output, args.overwrite):
        return
    excluded = set().union(*map(evaluated_images, args.exclude))
    data = ImageData(args.image_data) if args.image_data else None
    content = read_coco(args.mixed, "images", "annotations")
    left_out = clean(content, excluded, data, args.mixed)
    write_json(args.output, content)
    counts = {"captions": len(content["images"]), "boxes": len(content["annotations"])}
    report(args.output, counts, left_out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--mixed", type=Path, required=True, help="final_mixed_train*.json")
    parser.add_argument("--exclude", type=Path, nargs="+", required=True)
    parser.add_argument("--image-data", type=Path, help="Visual Genome's image_data.json")
    parser.add_argument("--output", type=Path, required=True, help="json to write")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
