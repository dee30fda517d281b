"""ODinW as data: folders, classes and prompts of its 35 sets."""

from __future__ import annotations

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fiber_d2.data.catalog import BUILTIN, ODINW13, ODINW35
from fiber_d2.data.catalog.odinw import ODINW_SETS
from fiber_d2.text import build_detection_prompts, load_tokenizer


def write(path, classes):
    """One image with a box of the last class."""
    content = {
        "images": [{"id": 1, "file_name": "a b.jpg", "height": 30, "width": 40}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": len(classes), "bbox": [1, 1, 9, 9]}
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes, start=1)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_which_sets_there_are():
    assert len(ODINW35) == len(set(ODINW35)) == 35
    assert sorted(ODINW13) == [
        "AerialMaritimeDrone_large",
        "Aquarium",
        "CottontailRabbits",
        "EgoHands_generic",
        "NorthAmericaMushrooms",
        "Packages",
        "PascalVOC",
        "Raccoon",
        "ShellfishOpenImages",
        "VehiclesOpenImages",
        "pistols",
        "pothole",
        "thermalDogsAndPeople",
    ]
    for key in ODINW35:
        choices = [f"train_shot{k}_seed{s}" for k in (1, 3, 5, 10) for s in (3, 30, 300)]
        for split in ("train", "val", "test", *choices):
            assert f"odinw_{key}_{split}" in BUILTIN


def test_files_are_apart():
    """No two entries share a file, but for the set without a split to test on."""
    files = {}
    for name, dataset in ODINW_SETS.items():
        files.setdefault(dataset.json_file, []).append(name)
    shared = [names for names in files.values() if len(names) > 1]
    assert shared == [["odinw_PascalVOC_val", "odinw_PascalVOC_test"]]


def test_folders_of_the_two_layouts():
    def where(name):
        return BUILTIN[name].json_file, BUILTIN[name].image_root

    drone = "odinw/AerialMaritimeDrone/large"
    assert where("odinw_AerialMaritimeDrone_large_val") == (
        f"{drone}/valid/annotations_without_background.json",
        f"{drone}/valid",
    )
    assert where("odinw_AerialMaritimeDrone_large_train_shot3_seed30") == (
        f"{drone}/train/fewshot_train_shot3_seed30.json",
        f"{drone}/train",
    )
    assert where("odinw_EgoHands_generic_minival") == (
        "odinw/EgoHands/generic/mini_val/annotations_without_background.json",
        "odinw/EgoHands/generic/mini_val",
    )
    assert where("odinw_pistols_test") == (
        "odinw/pistols/export/test_annotations_without_background.json",
        "odinw/pistols/export",
    )
    assert where("odinw_pistols_train_shot1_seed3") == (
        "odinw/pistols/export/fewshot_train_shot1_seed3.json",
        "odinw/pistols/export",
    )


@pytest.mark.parametrize("key", ODINW35)
def test_each_set_loads_and_can_be_asked_for(root, key):
    tokenizer = load_tokenizer("shapes")
    for split in ("train", "val", "test", "train_shot10_seed300"):
        name = f"odinw_{key}_{split}"
        dataset = BUILTIN[name]
        write(root / dataset.json_file, dataset.classes)
        (record,) = DatasetCatalog.get(name)
        assert record["file_name"] == str(root / dataset.image_root / "a b.jpg")
        assert record["annotations"][0]["category_id"] == len(dataset.classes) - 1
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == list(dataset.classes)
        assert (metadata.ground_truth, metadata.evaluator_type) == ("detection", "coco")
    prompts = metadata.get("prompts")
    assert (prompts is None) == (dataset.prompts is None)
    for templates in (None, prompts):
        asked = build_detection_prompts(tokenizer, metadata.thing_classes, templates=templates)
        assert sum(len(prompt.target_ids) for prompt in asked) == len(dataset.classes)


@pytest.mark.parametrize(
    ("key", "caption"),
    [
        (
            "Aquarium",
            " fish. jellyfish. penguin , which is black and white. puffin with orange beaks . "
            "shark. starfish. stingray which is flat and round",
        ),
        ("pothole", "there are some holes on the road"),
        ("Packages", "there is a package on the porch"),
        ("EgoHands_generic", " hand of a person"),
        ("CottontailRabbits", "rabbit"),
        ("NorthAmericaMushrooms", "flat mushroom. yellow mushroom"),
    ],
)
def test_published_prompts(root, key, caption):
    dataset = BUILTIN[f"odinw_{key}_val"]
    write(root / dataset.json_file, dataset.classes)
    DatasetCatalog.get(f"odinw_{key}_val")
    metadata = MetadataCatalog.get(f"odinw_{key}_val")
    (prompt,) = build_detection_prompts(
        load_tokenizer("shapes"), metadata.thing_classes, templates=metadata.prompts
    )
    assert prompt.text == caption


def test_another_version_of_a_set_is_used_as_it_is(root, caplog):
    """Its classes win, a warning says so, and prompts for other classes are left out."""
    name = "odinw_Aquarium_test"
    write(root / BUILTIN[name].json_file, ["shark", "fish"])
    with caplog.at_level(logging.WARNING):
        assert len(DatasetCatalog.get(name)) == 1
    assert "another version of odinw_Aquarium_test" in caplog.text
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["shark", "fish"]
    assert metadata.get("prompts") is None
