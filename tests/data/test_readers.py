"""What the readers make of good files, and what they say of bad ones."""

from __future__ import annotations

import json
import logging
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
from fiber_d2.data.readers import load_lvis_json


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


def classes_of(path, root, **options):
    """Names and ids as the metadata have them after loading, and the class of each annotation."""
    load = options.pop("load", load_detection_json)
    try:
        records = load(path, root, "reader_test", **options)
        metadata = MetadataCatalog.get("reader_test")
        ids = metadata.thing_dataset_id_to_contiguous_id
        found = [a["category_id"] for record in records for a in record["annotations"]]
        return metadata.thing_classes, ids, found
    finally:
        if "reader_test" in MetadataCatalog.list():
            MetadataCatalog.remove("reader_test")


def test_ids_may_begin_at_0_and_have_gaps(coco):
    content, path, root = coco
    for entry, new in zip(content["categories"], (4000, 0, -3)):
        old, entry["id"] = entry["id"], new
        for annotation in content["annotations"]:
            if annotation["category_id"] == old:
                annotation["category_id"] = new
    write(path, content)
    names, ids, found = classes_of(path, root)
    assert names == ["hot_dog", "cat", "bus"]
    assert ids == {4000: 0, 0: 1, -3: 2}
    assert found == [0, 1, 1, 2, 0, 0, 2]


@pytest.mark.parametrize("name", ["background", "Background"])
def test_a_background_without_boxes_is_no_class(coco, name):
    content, path, root = coco
    content["categories"].insert(0, {"id": 1, "name": name})
    write(path, content)
    names, ids, found = classes_of(path, root)
    assert names == ["hot_dog", "cat", "bus"] and ids == {7: 0, 3: 1, 9: 2}
    assert found[0] == 0


def test_a_background_with_boxes_is_a_class(coco):
    content, path, root = coco
    content["categories"].insert(0, {"id": 1, "name": "background"})
    content["annotations"][0]["category_id"] = 1
    write(path, content)
    names, ids, found = classes_of(path, root)
    assert names == ["background", "hot_dog", "cat", "bus"]
    assert ids == {1: 0, 7: 1, 3: 2, 9: 3}
    assert found[0] == 0


def roboflow(content, used=False):
    """The entry that Roboflow puts in front: the project, as the group of all the classes."""
    for category in content["categories"]:
        category["supercategory"] = "food"
    content["categories"].insert(0, {"id": 0, "name": "food", "supercategory": "none"})
    if used:
        content["annotations"][0]["category_id"] = 0


def test_roboflows_group_is_no_class(coco):
    content, path, root = coco
    roboflow(content)
    write(path, content)
    assert classes_of(path, root)[0] == ["hot_dog", "cat", "bus"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c["annotations"][0].update(category_id=0),
        lambda c: c["categories"][0].update(id=1),
        lambda c: c["categories"][0].update(supercategory="thing"),
        lambda c: [category.pop("supercategory") for category in c["categories"][1:]],
    ],
    ids=["used", "other id", "grouped itself", "no group"],
)
def test_what_only_looks_like_roboflows_group_is_a_class(coco, spoil):
    content, path, root = coco
    roboflow(content)
    spoil(content)
    write(path, content)
    assert classes_of(path, root)[0] == ["food", "hot_dog", "cat", "bus"]


def test_a_class_of_its_projects_name_stays(coco):
    content, path, root = coco
    content["categories"] = [{"id": 7, "name": "food"}, *content["categories"][1:]]
    roboflow(content)
    write(path, content)
    assert classes_of(path, root)[:2] == (["food", "cat", "bus"], {7: 0, 3: 1, 9: 2})


def test_classes_of_one_name_stay_apart_and_are_named_once(coco, caplog):
    content, path, root = coco
    content["categories"][2]["name"] = "hot_dog"
    write(path, content)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            names, ids, found = classes_of(path, root)
    assert names == ["hot_dog", "cat", "hot_dog"]
    assert found == [0, 1, 1, 2, 0, 0, 2]
    warnings = [r.getMessage() for r in caplog.records if "one name" in r.getMessage()]
    assert len(warnings) == 1 and "'hot_dog' (category ids 7, 9)" in warnings[0]
    caplog.clear()
    renamed = classes_of(path, root, class_names={9: "bus"})[0]
    assert renamed == ["hot_dog", "cat", "bus"]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_other_class_names(coco):
    _, path, root = coco
    by_id = classes_of(path, root, class_names={3: "kitten"})
    assert by_id == (["hot_dog", "kitten", "bus"], {7: 0, 3: 1, 9: 2}, [0, 1, 1, 2, 0, 0, 2])
    assert classes_of(path, root, class_names=["a", "b", "c"])[0] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"category ids \[5\].* have the ids \[7, 3, 9\]"):
        classes_of(path, root, class_names={5: "x"})
    with pytest.raises(ValueError, match="2 names, but .* has 3 classes: hot_dog, cat, bus"):
        classes_of(path, root, class_names=["a", "b"])


def test_a_file_that_changed_meanwhile_is_an_error(coco):
    content, path, root = coco
    try:
        load_detection_json(path, root, "reader_test")
        content["categories"][0]["name"] = "sausage"
        write(path, content)
        with pytest.raises(ValueError, match="'reader_test' has other thing_classes than before"):
            load_detection_json(path, root, "reader_test")
    finally:
        MetadataCatalog.remove("reader_test")


def test_records_are_lean(coco):
    content, path, root = coco
    for annotation in content["annotations"]:
        annotation.update(segmentation=[[1.0] * 8], area=1, keypoints=[0] * 51)
    write(path, content)
    keys = {"file_name", "height", "width", "image_id", "annotations"}
    for record in load_detection_json(path, root):
        assert set(record) == keys
        for annotation in record["annotations"]:
            assert set(annotation) == {"bbox", "bbox_mode", "category_id", "iscrowd"}


def test_files_of_test_servers_have_no_annotations(coco):
    content, path, root = coco
    del content["annotations"]
    write(path, content)
    records = load_detection_json(path, root, annotated=False)
    assert len(records) == 6 and not any(record["annotations"] for record in records)


def lvis(content, path):
    """Makes LVIS's json of COCO's; also with a file_name, which is not to be believed."""
    for index, image in enumerate(content["images"]):
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{index}.jpg"
        image["neg_category_ids"] = [9] if index else []
        image["not_exhaustive_category_ids"] = [3]
    for category, frequency in zip(content["categories"], "rcf"):
        category["frequency"] = frequency
    for annotation in content["annotations"]:
        del annotation["iscrowd"]
    write(path, content)


def test_lvis_records(coco):
    content, path, root = coco
    lvis(content, path)
    try:
        records = load_lvis_json(path, root, "reader_test")
        assert MetadataCatalog.get("reader_test").class_frequency == ["r", "c", "f"]
    finally:
        MetadataCatalog.remove("reader_test")
    assert records[1]["file_name"] == os.path.join(root, "train2017/1.jpg")
    assert [record["neg_category_ids"] for record in records] == [[]] + [[9]] * 5
    assert records[0]["not_exhaustive_category_ids"] == [3]
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1, 1]
    assert records[5]["annotations"] == []
    names, ids, _ = classes_of(path, root, load=load_lvis_json)
    assert names == ["hot_dog", "cat", "bus"] and ids == {7: 0, 3: 1, 9: 2}


def test_lvis_without_urls(coco):
    content, path, root = coco
    lvis(content, path)
    del content["images"][0]["coco_url"]
    write(path, content)
    assert load_lvis_json(path, root)[0]["file_name"] == os.path.join(root, "0.png")
    del content["images"][0]["file_name"]
    write(path, content)
    with pytest.raises(ValueError, match="image 10 lacks file_name"):
        load_lvis_json(path, root)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://x/../../etc", "leads out of"),
        ("http://x/train2017/..", "names no file"),
        ("../..", "leads out of"),
        ("http://x/train2017/", "does not end in a folder and a file"),
        ("http://x//passwd", "does not end in a folder and a file"),
        ("http://[a/train2017/0.jpg", "does not end in a folder and a file"),
        ("passwd", "does not end in a folder and a file"),
        (7, "does not end in a folder and a file"),
    ],
)
def test_urls_do_not_lead_out_of_the_image_folder(coco, url, message):
    content, path, root = coco
    lvis(content, path)
    content["images"][0]["coco_url"] = url
    write(path, content)
    with pytest.raises(ValueError, match=f"image 10 .*{message}"):
        load_lvis_json(path, root)


def test_queries_are_no_part_of_a_file_name(coco):
    content, path, root = coco
    lvis(content, path)
    content["images"][0]["coco_url"] = "http://x/train2017/0.jpg?size=../../big#a/b"
    write(path, content)
    assert load_lvis_json(path, root)[0]["file_name"] == os.path.join(root, "train2017/0.jpg")


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


def test_grounding_images_of_two_folders(grounding, tmp_path):
    content, path, root = grounding
    for image, source in zip(content["images"], ("coco", "vg", "coco")):
        image["data_source"] = source
    write(path, content)
    coco_root = str(tmp_path / "coco")
    records = load_grounding_json(path, root, coco_image_root=coco_root)
    assert [os.path.dirname(record["file_name"]) for record in records[:4]] == [
        coco_root,
        root,
        coco_root,
        root,
    ]
    assert [record.get("data_source") for record in records[:4]] == ["coco", "vg", "coco", None]
    content["images"][0]["file_name"] = "../0.png"
    write(path, content)
    with pytest.raises(ValueError, match=f"image 10 .*leads out of .*{coco_root}"):
        load_grounding_json(path, root, coco_image_root=coco_root)


def test_tokens_is_another_name_of_tokens_positive(grounding):
    content, path, root = grounding
    for annotation in content["annotations"]:
        annotation["tokens"] = annotation.pop("tokens_positive")
    write(path, content)
    first = load_grounding_json(path, root)[0]
    assert first["annotations"][0]["tokens_positive"] == [[0, 7]]


@pytest.mark.parametrize("load", [load_detection_json, load_lvis_json, load_grounding_json])
def test_the_first_image_folder_that_exists_is_used(coco, grounding, tmp_path, load):
    path = grounding[1] if load is load_grounding_json else coco[1]
    folders = [str(tmp_path / name) for name in ("first", "second", "third")]
    for present, expected in ((None, "first"), ("third", "third"), ("second", "second")):
        if present:
            (tmp_path / present).mkdir()
        records = load(path, folders)
        assert {os.path.dirname(record["file_name"]) for record in records} == {
            str(tmp_path / expected)
        }


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


NAN = float("nan")
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
    "image 12 .*names no file": lambda c: change(c, "images", 2, file_name="a/.."),
    "image 12 .*is no file name": lambda c: change(c, "images", 2, file_name=7),
    "image 12 .* height 0 ": lambda c: change(c, "images", 2, height=0),
    "image 12 .* width 'x'": lambda c: change(c, "images", 2, width="x"),
    r"image id \[1\]": lambda c: change(c, "images", 2, id=[1]),
    r"annotation 4 .* image \[11\]": lambda c: change(c, "annotations", 3, image_id=[11]),
    "annotation 4 .* category id None": lambda c: change(c, "annotations", 3, category_id=None),
    "annotation 4 .* bbox .*'5'": lambda c: change(c, "annotations", 3, bbox=[1, 1, 5, "5"]),
    "annotation 4 .* bbox .*nan": lambda c: change(c, "annotations", 3, bbox=[1, 1, 5, NAN]),
    "annotation 4 .* bbox .*10000000": lambda c: change(
        c, "annotations", 3, bbox=[1, 1, 5, 10**400]
    ),
    "annotation lacks image_id": lambda c: c["annotations"].append("text"),
    "category 9 with the name 7|category 9.*name 7": lambda c: change(c, "categories", 2, name=7),
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
    change(content, "annotations", 1, tokens_positive=[0, 3])
    write(path, content)
    with pytest.raises(ValueError, match=r"annotation 2 .* tokens_positive \[0, 3\] instead"):
        load_grounding_json(path, root)
    change(content, "images", 2, caption=None)
    write(path, content)
    with pytest.raises(ValueError, match="image 12 lacks caption"):
        load_grounding_json(path, root)
    change(content, "images", 2, caption=3)
    write(path, content)
    with pytest.raises(ValueError, match="image 12 .* caption 3, which is no text"):
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
