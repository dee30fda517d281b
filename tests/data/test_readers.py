"""What the readers make of good files, and what they say of bad ones."""

from __future__ import annotations

import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fiber_d2.data import (
    load_detection_json,
    load_grounding_json,
    register_all_builtin,
    register_coco_json,
)


def test_detection_records(coco):
    content, path, root = coco
    records = load_detection_json(path, root, "reader_test")
    metadata = MetadataCatalog.get("reader_test")
    # The order is that of the file, not of the ids.
    assert metadata.thing_classes == ["hot_dog", "cat", "bus"]
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 3: 1, 9: 2}
    assert [record["image_id"] for record in records] == [10, 11, 12, 13, 14, 15]
    assert records[0]["file_name"] == os.path.join(root, "0.png")
    assert (records[0]["width"], records[0]["height"]) == (40, 30)
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1, 1]
    assert [a["iscrowd"] for a in records[0]["annotations"]] == [0, 1, 0]
    assert records[0]["annotations"][0]["bbox"] == content["annotations"][0]["bbox"]
    assert records[0]["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS
    assert records[5]["annotations"] == []
    MetadataCatalog.remove("reader_test")


def test_background_is_no_class(coco, tmp_path):
    content, path, root = coco
    content["categories"].insert(1, {"id": 0, "name": "__background__"})
    content["annotations"][0]["category_id"] = 0
    write(path, content)
    records = load_detection_json(path, root)
    assert [a["category_id"] for a in records[0]["annotations"]] == [1, 1]


def test_grounding_records(grounding):
    content, path, root = grounding
    first, second = load_grounding_json(path, root)[:2]
    assert first["caption"] == "the dog left of a big cat"
    assert first["tokens_positive_eval"] == [[[0, 7]], [[16, 25]]]
    assert (first["sentence_id"], first["original_img_id"]) == (0, 100)
    assert [a["tokens_positive"] for a in first["annotations"]] == [
        [[0, 7]],
        [[0, 7]],
        [[14, 19], [20, 25]],
    ]
    assert "tokens_positive_eval" not in second and "dataset_name" not in second


def write(path, content):
    with open(path, "w") as file:
        json.dump(content, file)


@pytest.mark.parametrize("load", [load_detection_json, load_grounding_json])
def test_missing_file_names_path_and_remedy(load, tmp_path):
    path = str(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="nothing.json .*'mine'.*DETECTRON2_DATASETS"):
        load(path, "images", "mine")
    with pytest.raises(FileNotFoundError, match="python -m fiber_d2.data.shapes"):
        load(path, "images", "shapes_detection_train")


def test_not_json(tmp_path):
    (tmp_path / "a.json").write_text("hello")
    with pytest.raises(ValueError, match="a.json is not json"):
        load_detection_json(str(tmp_path / "a.json"), "")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="b.json is not json"):
        load_detection_json(str(tmp_path / "b.json"), "")


def change(content, kind, index, **values):
    for key, value in values.items():
        if value is None:
            del content[kind][index][key]
        else:
            content[kind][index][key] = value


BAD_DETECTION = {
    "is not COCO json: .* lacks annotations": lambda c: c.pop("annotations"),
    "lacks categories": lambda c: c.pop("categories"),
    "has no categories": lambda c: c["categories"].clear(),
    "repeats an id": lambda c: change(c, "categories", 1, id=7),
    "image 11 lacks width": lambda c: change(c, "images", 1, width=None),
    "two images of id 10": lambda c: change(c, "images", 1, id=10),
    "mix numbers and text": lambda c: change(c, "images", 5, id="x"),
    "annotation 4 lacks bbox": lambda c: change(c, "annotations", 3, bbox=None),
    "annotation 4 .* image 99": lambda c: change(c, "annotations", 3, image_id=99),
    "annotation 4 .* category id 8": lambda c: change(c, "annotations", 3, category_id=8),
    r"annotation 4 .* bbox \[1, 2\]": lambda c: change(c, "annotations", 3, bbox=[1, 2]),
    "image 11 .*leads out of": lambda c: change(c, "images", 1, file_name="a/../../x.png"),
    "image 10 .*leads out of": lambda c: change(c, "images", 0, file_name="/etc/x.png"),
}


@pytest.mark.parametrize("message", BAD_DETECTION)
def test_bad_detection_files(message, coco):
    content, path, root = coco
    BAD_DETECTION[message](content)
    write(path, content)
    with pytest.raises(ValueError, match=message):
        load_detection_json(path, root)


def test_a_list_is_not_coco_json(tmp_path):
    write(tmp_path / "list.json", [1, 2])
    with pytest.raises(ValueError, match="is not COCO json"):
        load_detection_json(str(tmp_path / "list.json"), "")


def test_bad_grounding_files(grounding):
    content, path, root = grounding
    change(content, "annotations", 1, tokens_positive=None)
    write(path, content)
    with pytest.raises(ValueError, match="annotation 2 .* no tokens_positive"):
        load_grounding_json(path, root)
    change(content, "images", 2, caption=None)
    write(path, content)
    with pytest.raises(ValueError, match="image 12 lacks caption|no tokens_positive"):
        load_grounding_json(path, root)


def test_paths_inside_the_root_are_fine(coco):
    content, path, root = coco
    change(content, "images", 0, file_name="sub/../0.png")
    change(content, "images", 1, file_name=os.path.join(root, "1.png"))
    write(path, content)
    files = [record["file_name"] for record in load_detection_json(path, root)]
    assert files[:2] == [os.path.join(root, "0.png"), os.path.join(root, "1.png")]


def test_builtin_table_is_registered_and_moves_with_its_root(tmp_path):
    names = [
        f"shapes_{k}_{s}" for k in ("detection", "grounding", "refexp") for s in ("train", "val")
    ]
    before = MetadataCatalog.get("shapes_grounding_val").json_file
    old_root = before[: before.index("shapes")].rstrip("/") or "."
    try:
        register_all_builtin(str(tmp_path))
        register_all_builtin(str(tmp_path))
        assert set(names) <= set(DatasetCatalog.list())
        metadata = MetadataCatalog.get("shapes_grounding_val")
        assert metadata.evaluator_type == "flickr" and metadata.split == "val"
        assert metadata.entities_root == str(tmp_path / "shapes/flickr30k_entities")
        assert MetadataCatalog.get("shapes_refexp_train").ground_truth == "refexp"
        assert MetadataCatalog.get("shapes_detection_val").evaluator_type == "coco"
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            DatasetCatalog.get("shapes_detection_val")
    finally:
        register_all_builtin(old_root)


def test_own_data(coco):
    _, path, root = coco
    register_coco_json("own_data", path, root)
    register_coco_json("own_data", path, root)
    assert len(DatasetCatalog.get("own_data")) == 6
    register_coco_json("own_data", path, root + "/other")
    assert "other" in DatasetCatalog.get("own_data")[0]["file_name"]
    DatasetCatalog.register("foreign_data", lambda: [])
    with pytest.raises(ValueError, match="'foreign_data' is taken"):
        register_coco_json("foreign_data", path, root)
    for name in ("own_data", "foreign_data"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
