"""LVIS: file names from URLs; minival by rule, by list, and compared with a list."""

from __future__ import annotations

import copy
import json

import lvis_v1 as script
import pytest
from lvis import LVIS

from fiber_d2.data import load_detection_json

URL = "http://images.cocodataset.org"


def lvis_json():
    folders = {1: "train2017", 7: "val2017", 30: "val2017", 31: "train2017", 40: "val2017"}
    images = [
        {
            "id": key,
            "coco_url": f"{URL}/{folder}/{key:012}.jpg",
            "width": 50,
            "height": 40,
            "neg_category_ids": [key % 3 + 1],
            "not_exhaustive_category_ids": [],
        }
        for key, folder in folders.items()
    ]
    annotations = [
        {
            "id": place,
            "image_id": key,
            "category_id": place % 3 + 1,
            "bbox": [place, 2, 10.5, 12],
            "area": 100.0,
            "segmentation": [[1, 1, 2, 2, 3, 1]],
        }
        for place, key in enumerate([1, 7, 7, 30, 31, 1], start=1)
    ]
    categories = [
        {"id": key, "name": f"class_{key}", "frequency": "rcf"[key - 1], "image_count": 9}
        for key in (1, 2, 3)
    ]
    return {
        "info": {"version": "v1"},
        "licenses": [{"id": 1}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


@pytest.fixture
def source(tmp_path, write):
    write(tmp_path / "val.json", lvis_json())
    return tmp_path


def arguments(source, *more):
    own = ["--json", source / "val.json", "--output", source / "out.json"]
    return [str(part) for part in (*own, *more)]


def result(source, *more, code=0):
    assert script.main(arguments(source, "--overwrite", *more)) == code
    return json.loads((source / "out.json").read_text())


def test_file_names_and_nothing_else(source):
    content = result(source)
    names = [image.pop("file_name") for image in content["images"]]
    assert names[:2] == ["train2017/000000000001.jpg", "val2017/000000000007.jpg"]
    assert content == lvis_json()


def test_minival_rule(source, capsys):
    content = result(source, "--minival-rule")
    assert [image["id"] for image in content["images"]] == [7, 30, 40]
    assert [a["id"] for a in content["annotations"]] == [2, 3, 4]
    assert content["categories"] == lvis_json()["categories"]
    assert "left out: 2 images that were not asked for, 3 boxes of those" in capsys.readouterr().out
    loaded = LVIS(str(source / "out.json"))
    assert sorted(loaded.get_img_ids()) == [7, 30, 40]
    records = load_detection_json(str(source / "out.json"), "coco")
    assert records[0]["file_name"] == "coco/val2017/000000000007.jpg"
    expected = [a["bbox"] for a in lvis_json()["annotations"][1:3]]
    assert [a["bbox"] for a in records[0]["annotations"]] == expected


@pytest.mark.parametrize(
    "name, content",
    [
        ("list.txt", "30\n1\n"),
        ("commas.txt", "1, 30"),
        ("list.json", [1, 30]),
        ("texts.json", ["1", "30"]),
        ("minival.json", {"images": [{"id": 30}, {"id": 1}], "annotations": []}),
    ],
)
def test_given_ids(name, content, source, write):
    path = write(source / name, content)
    content = result(source, "--ids", path)
    assert [image["id"] for image in content["images"]] == [1, 30]
    assert [a["image_id"] for a in content["annotations"]] == [1, 30, 1]


def test_compare(source, write, capsys):
    path = write(source / "list.json", [7, 30, 31])
    result(source, "--minival-rule", "--compare", path, code=1)
    out = capsys.readouterr().out
    assert "1 images not in" in out and "first 40" in out
    assert "1 images missing, but in" in out and "first 31" in out
    # A finished output is compared, too.
    assert script.main(arguments(source, "--compare", str(path))) == 1
    assert "left alone" in capsys.readouterr().out
    write(path, [7, 30, 40])
    assert script.main(arguments(source, "--compare", str(path))) == 0
    assert "0 images not in" in capsys.readouterr().out


def test_restarts(source, restarts):
    restarts(script.main, arguments(source, "--minival-rule"), source / "out.json")


def test_as_a_program(source, run_script):
    done = run_script("lvis_v1.py", *arguments(source, "--minival-rule"))
    assert done.returncode == 0 and "3 images, 3 boxes, 3 classes" in done.stdout
    assert run_script("lvis_v1.py", *arguments(source, "--minival-rule", "--ids", "x")).returncode


def test_bad_sources(source, write, fails):
    good = lvis_json()

    def check(*words, options=(), change=None):
        content = copy.deepcopy(good)
        if change:
            change(content)
        write(source / "val.json", content)
        fails(script.main, arguments(source, *options), *words, output=source / "out.json")

    check("image 7", "has no coco_url", change=lambda c: c["images"][1].pop("coco_url"))
    for url in ("a.jpg", "x/../a.jpg", "x/val2017/"):
        check("image 7", "coco_url", change=lambda c, u=url: c["images"][1].update(coco_url=u))
    check("annotation 2", "no image_id", change=lambda c: c["annotations"][1].pop("image_id"))
    check("no list 'categories'", change=lambda c: c.pop("categories"))
    path = str(write(source / "ids.json", [7, 98, 99]))
    check("2 of the 3", "98, 99", options=("--ids", path))
    write(source / "ids.json", {"categories": []})
    check("ids.json holds no list of image ids", options=("--ids", path))
    check("none.txt does not exist", options=("--ids", str(source / "none.txt")))
    write(source / "ids.txt", "seven")
    check("ids.txt holds no list", options=("--compare", str(source / "ids.txt")))

    def only_train(content):
        content["images"] = content["images"][:1]

    check("No image", "val2017", options=("--minival-rule",), change=only_train)
    write(source / "val.json", json.dumps(good)[:500])
    fails(script.main, arguments(source), "val.json is damaged", output=source / "out.json")
