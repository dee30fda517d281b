"""Roboflow's COCO exports, such as those of ODinW, without their background class.

    python datasets/prepare/roboflow.py --root datasets/odinw/Aquarium datasets/odinw/Raccoon

Expected tree under each root, at any depth:

    train/_annotations.coco.json    and the images
    valid/_annotations.coco.json
    test/_annotations.coco.json

Beside each of them an annotations_without_background.json is written. Roboflow puts a class in
front that no object has: id 0, called like the set or like the supercategory of the others. It is
removed, as is any class called background or __background__. Ids stay as they are, unless
--renumber makes them 1, 2, ... in the order of the file. Nothing else is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    coco_counts,
    fields,
    is_finished,
    progress,
    read_coco,
    report,
    run,
    script_parser,
    write_json,
)

SOURCE = "_annotations.coco.json"
OUTPUT = "annotations_without_background.json"
BACKGROUND_NAMES = ("background", "__background__")


def is_background(category: Mapping[str, Any], categories: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an entry of ``categories`` is no class but Roboflow's group of them, or background.

    The group has id 0, belongs to no supercategory, and is the supercategory of another entry.
    """
    if str(category["name"]).lower() in BACKGROUND_NAMES:
        return True
    return (
        category["id"] == 0
        and category.get("supercategory") in (None, "", "none")
        and any(
            other is not category and other.get("supercategory") == category["name"]
            for other in categories
        )
    )


def clean(content: dict[str, Any], path: Path, renumber: bool = False) -> Counter:
    """Removes the background entries from ``content``; returns what was left out.

    Raises:
        ValueError: there is no class, an annotation is of an unknown class, or objects are of the
            background.
    """
    categories = content["categories"]
    for category in categories:
        fields(category, ("id", "name"), f"A category of {path}")
    kept = [category for category in categories if not is_background(category, categories)]
    if not kept:
        raise ValueError(f"{path} has no class besides the background.")
    ids = [category["id"] for category in kept]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path} has several classes of one id: {ids}.")
    number = {old: place if renumber else old for place, old in enumerate(ids, start=1)}
    known = {category["id"]: category["name"] for category in categories}
    used = Counter()
    for annotation in content["annotations"]:
        where = f"The annotation {annotation.get('id')} of {path}"
        (category_id,) = fields(annotation, ("category_id",), where)
        if category_id not in known:
            raise ValueError(f"{where} is of the category {category_id!r}, which is not there.")
        used[category_id] += 1
        annotation["category_id"] = number.get(category_id)
    for category_id in set(used) - set(number):
        raise ValueError(
            f"{path}: {used[category_id]} annotations are of the background category "
            f"{category_id} ({known[category_id]!r}). Give them the id of their true class, or, "
            "if it is a class, rename it and set its supercategory to its own name."
        )
    content["categories"] = [{**category, "id": number[category["id"]]} for category in kept]
    return Counter({"background entries": len(categories) - len(kept)})


def find_exports(roots: Sequence[Path]) -> dict[Path, list[Path]]:
    """The exports below the roots: folder of each set -> its files, one per split.

    Raises:
        FileNotFoundError: a root has none.
    """
    found: dict[Path, list[Path]] = {}
    for root in roots:
        files = sorted(root.rglob(SOURCE))
        if not files:
            raise FileNotFoundError(f"{root} holds no {SOURCE}: give the folder of the export.")
        for path in files:
            found.setdefault(path.parent.parent, []).append(path)
    return found


def clean_set(paths: Sequence[Path], renumber: bool) -> dict[Path, tuple[dict[str, Any], Counter]]:
    """Per split of a set its cleaned contents and what was left out.

    Raises:
        ValueError: as of :func:`clean`, or the splits have different classes.
    """
    cleaned, classes = {}, {}
    for path in paths:
        content = read_coco(path, "images", "annotations", "categories")
        cleaned[path] = content, clean(content, path, renumber)
        classes[path] = [(c["id"], c["name"]) for c in content["categories"]]
        if classes[path] != classes[paths[0]]:
            raise ValueError(
                f"{path} has other classes than {paths[0]}: {classes[path]} and "
                f"{classes[paths[0]]}. The splits of a set must share their classes."
            )
    return cleaned


def work(args: argparse.Namespace) -> None:
    for paths in progress(find_exports(args.root).values(), "sets"):
        pending = [p for p in paths if not is_finished(p.with_name(OUTPUT), args.overwrite)]
        # All splits are read where one is missing: their classes have to agree.
        cleaned = clean_set(paths, args.renumber) if pending else {}
        for path in pending:
            content, left_out = cleaned[path]
            write_json(path.with_name(OUTPUT), content)
            report(path.with_name(OUTPUT), coco_counts(content), left_out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--root", type=Path, nargs="+", required=True, help="folders of exports")
    parser.add_argument("--renumber", action="store_true", help="category ids 1, 2, ...")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
