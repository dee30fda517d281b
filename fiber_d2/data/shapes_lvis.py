"""LVIS annotations of the generated data: thinned classes, verified-absent and partial ones."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from .shapes_params import SPLITS, ShapesParams

MAX_NEGATIVES = 4
PARTIAL_SHARE = 0.25


def lvis_json(
    coco: dict[str, Any],
    split: str,
    params: ShapesParams,
    train_annotations: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The federated view of a COCO json.

    LVIS does not annotate every class in every image. A third of the classes is annotated in at
    most ``lvis_rare_max`` images, a third in at most ``lvis_common_max``, the rest wherever they
    occur. In the other images such a class is neither annotated nor listed as absent, so a
    detection of it there counts neither way. ``frequency`` follows from the number of annotated
    training images by the same two limits: "r", "c" or "f".

    Args:
        coco: the complete annotations of the split.
        train_annotations: complete annotations of the training split, whose counts decide;
            None to count ``coco`` itself.
    """
    kept = thin(coco["annotations"], split, params)
    if train_annotations is None:
        counted = kept
    else:
        counted = thin(train_annotations, "train", params)
    rng = np.random.default_rng([params.seed, SPLITS.index(split), 7])
    present: dict[int, set[int]] = defaultdict(set)
    for annotation in coco["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
    annotated: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in kept:
        annotated[annotation["image_id"]].append(annotation)

    images, annotations = [], []
    for image in coco["images"]:
        number = image["id"]
        absent = sorted(set(range(1, len(params.class_names) + 1)) - present[number])
        negatives = rng.permutation(absent)[:MAX_NEGATIVES].tolist()
        counts = Counter(a["category_id"] for a in annotated[number])
        partial = [c for c, n in sorted(counts.items()) if n > 1 and rng.random() < PARTIAL_SHARE]
        left_out = set(partial)
        for annotation in annotated[number]:
            if annotation["category_id"] in left_out:  # the first of each partial class
                left_out.discard(annotation["category_id"])
                continue
            entry = {k: v for k, v in annotation.items() if k not in ("iscrowd", "attributes")}
            annotations.append(entry | {"id": len(annotations) + 1})
        images.append(
            {
                **image,
                "coco_url": f"http://shapes.invalid/images/{split}/{image['file_name']}",
                "neg_category_ids": sorted(negatives),
                "not_exhaustive_category_ids": partial,
            }
        )
    return {
        "info": {
            **coco["info"],
            "frequency": f"r: at most {params.lvis_rare_max} training images, "
            f"c: at most {params.lvis_common_max}, f: more",
        },
        "licenses": coco["licenses"],
        "images": images,
        "annotations": annotations,
        "categories": _categories(coco["categories"], counted, params),
    }


def thin(
    annotations: list[dict[str, Any]], split: str, params: ShapesParams
) -> list[dict[str, Any]]:
    """Annotations without those of rare and common classes beyond their number of images."""
    num_classes = len(params.class_names)
    order = np.random.default_rng([params.seed, 5]).permutation(num_classes) + 1
    third = num_classes // 3
    limits = {int(c): params.lvis_rare_max for c in order[:third]}
    limits |= {int(c): params.lvis_common_max for c in order[third : 2 * third]}
    images_of: dict[int, set[int]] = defaultdict(set)
    for annotation in annotations:
        images_of[annotation["category_id"]].add(annotation["image_id"])
    for category, limit in limits.items():
        rng = np.random.default_rng([params.seed, SPLITS.index(split), 6, category])
        images_of[category] = set(rng.permutation(sorted(images_of[category]))[:limit].tolist())
    return [a for a in annotations if a["image_id"] in images_of[a["category_id"]]]


def _categories(
    categories: list[dict[str, Any]], counted: list[dict[str, Any]], params: ShapesParams
) -> list[dict[str, Any]]:
    instances = Counter(a["category_id"] for a in counted)
    pairs = {(a["category_id"], a["image_id"]) for a in counted}
    images = Counter(category for category, _ in pairs)
    entries = []
    for category in categories:
        number, name = category["id"], category["name"].replace(" ", "_")
        count = images[number]
        rare, common = count <= params.lvis_rare_max, count <= params.lvis_common_max
        entries.append(
            {
                "id": number,
                "name": name,
                "frequency": "r" if rare else "c" if common else "f",
                "image_count": count,
                "instance_count": instances[number],
                "synset": f"{name}.n.01",
                "synonyms": [name],
                "def": f"a generated {category['name']}",
            }
        )
    return entries
