"""LVIS v1: file names for the images, and minival.

    python datasets/prepare/lvis_v1.py --json datasets/lvis/lvis_v1_train.json \\
        --output datasets/lvis/lvis_od_train.json
    python datasets/prepare/lvis_v1.py --json datasets/lvis/lvis_v1_val.json \\
        --output datasets/lvis/lvis_od_val.json
    python datasets/prepare/lvis_v1.py --json datasets/lvis/lvis_v1_val.json --minival-rule \\
        --output datasets/lvis/lvis_v1_minival_inserted_image_name.json [--compare LIST]

Expected tree (LVIS's official json files; its images are COCO's and are not read):

    datasets/lvis/lvis_v1_train.json  lvis_v1_val.json

Every image gets the file_name that its coco_url ends with, e.g. val2017/000000397133.jpg, relative
to the folder datasets/coco. Nothing else is changed.

Minival is the part of the validation set that is in COCO's val2017: --minival-rule keeps the
images whose coco_url lies there (4,809 are expected of LVIS v1). The published list is the
authority: where you have one, as ids in a .txt, a json list, or a json with images such as a
downloaded minival file, use --ids LIST to take its images instead, or --compare LIST to see the
differences (exit code 1 if there are any; the output is written all the same).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from common import (
    coco_counts,
    fields,
    is_finished,
    progress,
    read_coco,
    read_json,
    read_text,
    report,
    run,
    script_parser,
    write_json,
)

MINIVAL_FOLDER = "val2017"


def add_file_names(content: dict[str, Any], path: Path) -> None:
    """Gives every image the last two parts of its ``coco_url`` as ``file_name``.

    Raises:
        ValueError: an image has no such URL.
    """
    for image in progress(content["images"], "images"):
        (image_id,) = fields(image, ("id",), f"An image of {path}")
        (url,) = fields(image, ("coco_url",), f"The image {image_id} of {path}")
        parts = str(url).split("/")[-2:]
        if len(parts) != 2 or not parts[1] or parts[0] in ("", ".", ".."):
            raise ValueError(
                f"The image {image_id} of {path} has the coco_url {url!r}, which does not end with "
                "a folder and a file."
            )
        image["file_name"] = "/".join(parts)


def read_ids(path: Path) -> set[int]:
    """Image ids of a text file, a json list of numbers, or the ``images`` of a json file.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is nothing of that kind.
    """
    remedy = "It must list image ids: as text, as a json list, or as the images of a json file."
    if path.suffix == ".json":
        found = read_json(path, remedy)
        found = found.get("images") if isinstance(found, dict) else found
        found = found if isinstance(found, list) else []
        ids = [entry.get("id") if isinstance(entry, dict) else entry for entry in found]
    else:
        ids = read_text(path, remedy).replace(",", " ").split()
    try:
        numbers = {int(value) for value in ids}
    except (TypeError, ValueError):
        numbers = set()
    if not numbers:
        raise ValueError(f"{path} holds no list of image ids. {remedy}")
    return numbers


def in_minival(image: dict[str, Any]) -> bool:
    return image["file_name"].split("/")[0] == MINIVAL_FOLDER


def keep_images(content: dict[str, Any], ids: Collection[int], path: Path) -> None:
    """Keeps these images and their annotations; categories stay.

    Raises:
        ValueError: some of them are not there.
    """
    missing = sorted(set(ids) - {image["id"] for image in content["images"]})
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(ids)} image ids are not in {path}, for example "
            f"{', '.join(map(str, missing[:5]))}: minival is part of LVIS v1 val."
        )
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]


def compare(ours: set[int], listed: set[int], output: Path, path: Path) -> int:
    """Prints how the images differ from a list; 1 if they do, else 0."""
    for ids, what in ((ours - listed, "not in"), (listed - ours, "missing, but in")):
        examples = ", ".join(map(str, sorted(ids)[:10]))
        print(f"{output}: {len(ids)} images {what} {path}" + (f", first {examples}" * bool(ids)))
    return int(ours != listed)


def convert(content: dict[str, Any], path: Path, ids: set[int] | None, minival_rule: bool) -> None:
    """Adds the file names, then keeps the given images or those of the minival rule."""
    add_file_names(content, path)
    for annotation in content["annotations"]:
        fields(annotation, ("image_id",), f"The annotation {annotation.get('id')} of {path}")
    if minival_rule:
        ids = {image["id"] for image in content["images"] if in_minival(image)}
        if not ids:
            raise ValueError(f"No image of {path} is in COCO's val2017: give LVIS v1 val.")
    if ids is not None:
        keep_images(content, ids, path)


def work(args: argparse.Namespace) -> int:
    listed = read_ids(args.compare) if args.compare else None
    if is_finished(args.output, args.overwrite):
        content = read_coco(args.output, "images") if listed else None
    else:
        content = read_coco(args.json, "images", "annotations", "categories")
        before = len(content["images"]), len(content["annotations"])
        convert(content, args.json, read_ids(args.ids) if args.ids else None, args.minival_rule)
        write_json(args.output, content)
        counts = coco_counts(content)
        left_out = {
            "images that were not asked for": before[0] - counts["images"],
            "boxes of those": before[1] - counts["boxes"],
        }
        report(args.output, counts, left_out)
    if listed is None:
        return 0
    ours = {image["id"] for image in content["images"]}
    return compare(ours, listed, args.output, args.compare)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--json", type=Path, required=True, help="official LVIS json")
    parser.add_argument("--output", type=Path, required=True, help="json to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ids", type=Path, metavar="LIST", help="keep the images of a list")
    which.add_argument("--minival-rule", action="store_true", help="keep those of val2017")
    parser.add_argument("--compare", type=Path, metavar="LIST", help="print differences to a list")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
