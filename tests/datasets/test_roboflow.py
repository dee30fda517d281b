"""Roboflow exports: the background goes, everything else stays."""

from __future__ import annotations

import copy
import json

import pytest
import roboflow as script
from detectron2.data import MetadataCatalog

from fiber_d2.data import load_detection_json

CATEGORIES = [
    {"id": 0, "name": "creatures", "supercategory": "none"},
    {"id": 1, "name": "fish", "supercategory": "creatures"},
    {"id": 4, "name": "starfish", "supercategory": "creatures"},
]


def export():
    return {
        "info": {"description": "Exported from roboflow.ai"},
        "licenses": [{"id": 1, "name": "CC BY 4.0"}],
        "categories": copy.deepcopy(CATEGORIES),
        "images": [
            {"id": key, "license": 1, "file_name": f"{key}.jpg", "height": 40, "width": 50}
            for key in (0, 1)
        ],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 4, "bbox": [1, 2, 3.5, 4], "iscrowd": 0},
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [5, 6, 7, 8], "iscrowd": 0},
        ],
    }


@pytest.fixture
def root(tmp_path, write):
    for split in ("train", "valid", "test"):
        write(tmp_path / "Aquarium" / "v2" / split / script.SOURCE, export())
    return tmp_path / "Aquarium"


def output(root, split="train"):
    return root / "v2" / split / script.OUTPUT


def test_only_the_background_goes(root, capsys):
    assert script.main(["--root", str(root)]) == 0
    expected = export()
    del expected["categories"][0]
    for split in ("train", "valid", "test"):
        assert json.loads(output(root, split).read_text()) == expected
    assert capsys.readouterr().out.count("2 classes; left out: 1 background entries") == 3
    records = load_detection_json(str(output(root)), "images", "roboflow_test")
    assert MetadataCatalog.get("roboflow_test").thing_classes == ["fish", "starfish"]
    MetadataCatalog.remove("roboflow_test")
    assert [(a["category_id"], a["bbox"]) for a in records[0]["annotations"]] == [
        (1, [1, 2, 3.5, 4]),
        (0, [5, 6, 7, 8]),
    ]
    assert records[1]["annotations"] == []


def test_renumber(root):
    assert script.main(["--root", str(root), "--renumber"]) == 0
    content = json.loads(output(root).read_text())
    assert [(c["id"], c["name"]) for c in content["categories"]] == [(1, "fish"), (2, "starfish")]
    assert [a["category_id"] for a in content["annotations"]] == [2, 1]


def names_left(categories):
    content = {"categories": copy.deepcopy(categories), "images": [], "annotations": []}
    script.clean(content, "a.json")
    return [(category["id"], category["name"]) for category in content["categories"]]


def test_what_is_background():
    # A set of one class is called like its class.
    raccoon = [
        {"id": 0, "name": "raccoon", "supercategory": "none"},
        {"id": 1, "name": "raccoon", "supercategory": "raccoon"},
    ]
    assert names_left(raccoon) == [(1, "raccoon")]
    # The first class of an export without a group, and one of another id, are classes.
    plain = [{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 1, "name": "dog"}]
    assert names_left(plain) == [(0, "cat"), (1, "dog")]
    other = [{**CATEGORIES[0], "id": 5}, *CATEGORIES[1:]]
    assert names_left(other) == [(5, "creatures"), (1, "fish"), (4, "starfish")]
    named = [{"id": 3, "name": "Background"}, {"id": 0, "name": "__background__"}, *CATEGORIES[1:]]
    assert names_left(named) == [(1, "fish"), (4, "starfish")]


def test_restarts(root, restarts):
    restarts(script.main, ["--root", root], output(root, "valid"))


def test_as_a_program(root, run_script):
    done = run_script("roboflow.py", "--root", root)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 3


def test_bad_sources(root, tmp_path, write, fails):
    def check(*words, change, split="valid"):
        content = export()
        change(content)
        path = write(root / "v2" / split / script.SOURCE, content)
        fails(script.main, ["--root", root], *words, str(path), output=output(root))
        write(path, export())

    def used(content):
        content["annotations"][1]["category_id"] = 0

    check("1 annotations", "background category 0 ('creatures')", "true class", change=used)
    check("annotation 1", "category 9", change=lambda c: c["annotations"][1].update(category_id=9))
    check("no category_id", change=lambda c: c["annotations"][1].pop("category_id"))
    check("category", "no name", change=lambda c: c["categories"][1].pop("name"))
    check("several classes of one id", change=lambda c: c["categories"][2].update(id=1))
    check("no list 'annotations'", change=lambda c: c.pop("annotations"))
    check("must share their classes", change=lambda c: c["categories"][2].update(name="ray"))
    check(
        "no class besides", change=lambda c: c.update(categories=[{"id": 0, "name": "background"}])
    )
    (tmp_path / "empty").mkdir()
    fails(script.main, ["--root", tmp_path / "empty"], "empty holds no _annotations.coco.json")
    (root / "v2" / "test" / script.SOURCE).write_text('{"images": [')
    fails(script.main, ["--root", root], "damaged", output=output(root))
