"""Flickr30k Entities: parsing, recall, errors

SPEC_DATA_EVAL section 1, ``a_flickr.json``.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fiber_d2.evaluation import phrase_recall
from fiber_d2.evaluation.entities import EntityImage, parse_image

from .common import Section, read_json

# "merged_iou0.7_top1_3": protocol, IoU threshold, k (the table's own keys name them, too).
_TABLE = re.compile(r"(?P<protocol>separate|merged)(_iou(?P<iou>[\d.]+)_top[\d_]+)?")


def check(directory: Path) -> Section:
    section = Section("a")
    content = read_json(directory, "a_flickr.json")
    images = {
        image["image_id"]: parse_image(image["xml"], image["sentences"])
        for image in content["images"]
    }
    _check_parsing(section, content, images)
    for name, table in content["expected"].items():
        with section.case(name):
            _check_recall(section, content, images, name, table)
    for case in content["error_cases"]:
        with section.case(case["case"]):
            _check_error(section, content, images, case)
    return section


def _check_parsing(
    section: Section, content: dict[str, Any], images: Mapping[str, EntityImage]
) -> None:
    section.equal("parsed images", sorted(images), sorted(content["parsed"]))
    for name, expected in content["parsed"].items():
        with section.case(f"image {name}"):
            image = images[name]
            section.equal("boxes", image.boxes, expected["boxes"])
            section.equal("merged boxes", image.merged().boxes, expected["merged"])
            found = [
                [
                    {
                        "first_word_index": phrase.first_word,
                        "phrase": phrase.text,
                        "phrase_id": phrase.entity,
                        "phrase_type": phrase.types,
                    }
                    for phrase in image.evaluable(sentence)
                ]
                or None
                for sentence in range(len(image.sentences))
            ]
            section.equal("sentences", found, expected["sentences"])
    evaluable = [
        f"{name}_{sentence}"
        for name, image in images.items()
        for sentence in range(len(image.sentences))
        if image.evaluable(sentence)
    ]
    section.equal(
        "evaluable sentences", sorted(evaluable), sorted(content["evaluable_sentence_ids"])
    )


def _check_recall(
    section: Section,
    content: dict[str, Any],
    images: Mapping[str, EntityImage],
    name: str,
    table: dict[str, dict[str, float]],
) -> None:
    match = _TABLE.fullmatch(name)
    if match is None:
        raise ValueError("no such protocol is known")
    found = phrase_recall(
        images,
        content["predictions"],
        topk=[int(k) for k in table],
        iou_thresh=float(match["iou"] or content["iou_thresh"]),
        protocol=match["protocol"],
    )
    for k, expected in table.items():
        recall = found[int(k)]
        section.equal(f"categories at k={k}", sorted(recall), sorted(expected))
        for category in sorted(recall.keys() & expected.keys()):
            section.close(f"{category} at k={k}", recall[category], expected[category], 1e-9)


def _check_error(
    section: Section,
    content: dict[str, Any],
    images: Mapping[str, EntityImage],
    case: dict[str, Any],
) -> None:
    def is_meant(record: dict[str, Any]) -> bool:
        return (record["image_id"], record["sentence_id"]) == (
            case["image_id"],
            case["sentence_id"],
        )

    records = [record for record in content["predictions"] if not is_meant(record)]
    if case["case"] == "too_many_phrases":
        records += [
            {**record, "boxes": [*record["boxes"], [[0.0, 0.0, 0.0, 0.0]]]}
            for record in content["predictions"]
            if is_meant(record)
        ]
    elif case["case"] != "missing_sentence":
        raise ValueError("no such case is known")
    kind = getattr(builtins, case["raises"])
    section.raises("error", lambda: phrase_recall(images, records), kind)
