"""The generated data set through the built-in names, readers, mappers and loaders."""

from __future__ import annotations

import json
import os

import pytest
from detectron2.data import MetadataCatalog

from fiber_d2.data import build_test_loader, build_train_loader, register_all_builtin
from fiber_d2.data.shapes import prepare_shapes
from fiber_d2.text import load_tokenizer

TOKENIZER = load_tokenizer("shapes")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    prepare_shapes(str(root / "shapes"), seed=0, num_train=12, num_val=6)
    register_all_builtin(str(root))
    yield root
    register_all_builtin()


def words(prompt):
    return [TOKENIZER.decode(prompt.input_ids[row > 0]).strip() for row in prompt.positive_map]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["detection", "grounding", "refexp"])
def test_every_image_makes_a_prompt_that_reads_its_phrases(shapes, kind, split):
    name = f"shapes_{kind}_{split}"
    metadata = MetadataCatalog.get(name)
    with open(metadata.json_file) as file:
        content = json.load(file)
    loader = build_test_loader(dataset=name, tokenizer="shapes", augmentations=[], num_workers=0)
    items = [item for batch in loader for item in batch]
    by_id = {image["id"]: image for image in content["images"]}
    assert sorted(item["image_id"] for item in items) == sorted(by_id)
    spans = {
        a["image_id"]: [a["tokens_positive"]] for a in content["annotations"] if kind == "refexp"
    }
    for item in items:
        image = by_id[item["image_id"]]
        if kind == "detection":
            assert words(item["prompt"]) == metadata.thing_classes
            continue
        if kind == "grounding":
            spans[image["id"]] = image["tokens_positive_eval"]
        expected = [
            " ".join(image["caption"][b:e] for b, e in phrase) for phrase in spans[image["id"]]
        ]
        assert words(item["prompt"]) == expected
        assert kind == "grounding" or item["dataset_name"] == image["dataset_name"]
    if kind == "grounding":
        assert os.path.isdir(metadata.entities_root)


def test_one_training_mixture_of_the_three_tasks(shapes):
    loader = build_train_loader(
        datasets=[f"shapes_{kind}_train" for kind in ("detection", "grounding", "refexp")],
        tokenizer="shapes",
        augmentations=[],
        total_batch_size=24,
        num_workers=0,
        weights=[1, 1, 1],
    )
    kinds = set()
    for item in next(iter(loader)):
        kinds.add(("caption" in item, "sentence_id" in item))
        assert item["instances"].gt_positive_map.any(dim=1).all()
    assert kinds == {(False, False), (True, True), (True, False)}
