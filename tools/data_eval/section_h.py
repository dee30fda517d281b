"""Few-shot subsets

SPEC_DATA_EVAL section 5.10, ``h_fewshot.json``.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from fiber_d2.data.fewshot import few_shot_subset

from .common import Section, read_json

# Class of the original, number of shots and seed.
_NAME = re.compile(r"(?P<kind>\w+?)_shot(?P<shots>\d+)_seed(?P<seed>\d+)")
_KINDS = ("CocoGrounding", "COCODataset")


def check(directory: Path) -> Section:
    section = Section("h")
    for number, content in enumerate(read_json(directory, "h_fewshot.json")["cases"]):
        records = _records(content["dataset"])
        category_ids = [category["id"] for category in content["dataset"]["categories"]]
        for name, expected in content["expected"].items():
            with section.case(f"case {number}, {name}"):
                match = _NAME.fullmatch(name)
                if match is None or match["kind"] not in _KINDS:
                    raise ValueError("no such selection is known")
                # The original's grounding data ignore the seed; its detection data shuffle, but
                # take the seed 0 for none.
                shuffled = match["kind"] == "COCODataset" and int(match["seed"]) != 0
                shots, seed = int(match["shots"]), int(match["seed"]) if shuffled else None
                chosen = few_shot_subset(records, shots, seed=seed)
                found = [records[index]["image_id"] for index in chosen]
                # The original counts budgets in an array at id - 1: of too few entries where ids
                # are sparse (an IndexError), at its end for the id 0. Ours counts by id, so that
                # these cases are held against the rule instead.
                if expected == "IndexError" or (shots and 0 in category_ids):
                    section.note(
                        "selections where category ids exceed the original's array, which are held "
                        "against the rule instead"
                    )
                    _check_rule(section, records, found, shots, seed)
                else:
                    section.equal("image ids", found, expected)
    return section


def _records(dataset: dict[str, Any]) -> list[dict[str, Any]]:
    """Dataset records with the file's own category ids, in the order of the file."""
    records = {
        image["id"]: {"image_id": image["id"], "annotations": []} for image in dataset["images"]
    }
    for annotation in dataset["annotations"]:
        kept = {key: annotation[key] for key in ("bbox", "category_id", "iscrowd")}
        entry = {**kept, "bbox_mode": BoxMode.XYWH_ABS}
        records[annotation["image_id"]]["annotations"].append(entry)
    return list(records.values())


def _check_rule(
    section: Section, records: list[dict], found: list[int], shots: int, seed: int | None
) -> None:
    """Every image is in the selection if and only if one of its classes was still wanted."""
    by_id = {record["image_id"]: record["annotations"] for record in records}
    order = sorted(
        image_id
        for image_id, annotations in by_id.items()
        if any(min(annotation["bbox"][2:]) > 1 for annotation in annotations)
    )
    if shots and seed is not None:
        random.Random(seed).shuffle(order)
    section.equal("order", found, [image_id for image_id in order if image_id in set(found)])
    wrong = []
    for place, image_id in enumerate(order):
        earlier = [
            {annotation["category_id"] for annotation in by_id[other]}
            for other in order[:place]
            if other in found
        ]
        wanted = not shots or any(
            sum(annotation["category_id"] in classes for classes in earlier) < shots
            for annotation in by_id[image_id]
        )
        if wanted != (image_id in found):
            wrong.append(image_id)
    section.equal("images against the rule", wrong, [])
