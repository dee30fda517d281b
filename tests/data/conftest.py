"""A tiny detection set and a tiny grounding set on disk, in the real formats."""

from __future__ import annotations

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fiber_d2.data import load_grounding_json, register_all_builtin, register_coco_json

CAPTIONS = [
    "the dog left of a big cat",
    "a red kite on the right side",
    "two dogs",
    "a cat",
    "the leftmost bus",
    "a bus",
]


def _write_images(folder, sizes):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    images = []
    for index, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append(
            {"id": 10 + index, "file_name": f"{index}.png", "width": width, "height": height}
        )
    return images


@pytest.fixture
def coco(tmp_path):
    """COCO json of six images (the last without boxes), as (content, json path, image root)."""
    sizes = [(40, 30), (30, 40), (40, 40), (50, 30), (30, 50), (32, 32)]
    images = _write_images(tmp_path / "images", sizes)
    annotations = [
        {"id": 1, "image_id": 10, "bbox": [4, 6, 10, 12], "category_id": 7, "iscrowd": 0},
        {"id": 2, "image_id": 10, "bbox": [0, 0, 20, 20], "category_id": 3, "iscrowd": 1},
        {"id": 3, "image_id": 10, "bbox": [30, 20, 20, 20], "category_id": 3, "iscrowd": 0},
        {"id": 4, "image_id": 11, "bbox": [1, 1, 5, 5], "category_id": 9, "iscrowd": 0},
        {"id": 5, "image_id": 12, "bbox": [1, 1, 5, 5], "category_id": 7, "iscrowd": 0},
        {"id": 6, "image_id": 13, "bbox": [1, 1, 5, 5], "category_id": 7, "iscrowd": 0},
        {"id": 7, "image_id": 14, "bbox": [1, 1, 5, 5], "category_id": 9, "iscrowd": 0},
    ]
    categories = [{"id": 7, "name": "hot_dog"}, {"id": 3, "name": "cat"}, {"id": 9, "name": "bus"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return content, str(path), str(tmp_path / "images")


@pytest.fixture
def grounding(coco, tmp_path):
    """MDETR-style json over the same images: one sentence each."""
    content, _, root = coco
    images = [
        {**image, "caption": caption, "sentence_id": k, "original_img_id": 100 + k}
        for k, (image, caption) in enumerate(zip(content["images"], CAPTIONS))
    ]
    images[0]["tokens_positive_eval"] = [[[0, 7]], [[16, 25]]]
    spans = {10: [[0, 7]], 11: [[0, 10]], 12: [[4, 8]], 13: [[2, 5]], 14: [[0, 16]]}
    annotations = [
        {**entry, "category_id": 1, "tokens_positive": spans[entry["image_id"]]}
        for entry in content["annotations"]
    ]
    annotations[2]["tokens_positive"] = [[14, 19], [20, 25]]
    path = tmp_path / "sentences.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return {"images": images, "annotations": annotations}, str(path), root


@pytest.fixture
def names(coco, grounding):
    """The two sets in the catalogue, as (detection name, grounding name)."""
    register_coco_json("tiny_detection", *coco[1:])
    DatasetCatalog.register("tiny_grounding", lambda: load_grounding_json(*grounding[1:]))
    MetadataCatalog.get("tiny_grounding").set(ground_truth="grounding")
    yield "tiny_detection", "tiny_grounding"
    for name in ("tiny_detection", "tiny_grounding"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def root(tmp_path):
    """The folder of all data sets, which the whole table reads for the length of a test."""
    register_all_builtin(str(tmp_path))
    yield tmp_path
    register_all_builtin()
