"""Pascal VOC -> COCO: coordinates, sizes, difficult objects, class order."""

from __future__ import annotations

import json

import pytest
import voc_to_coco as script
from detectron2.data import MetadataCatalog
from PIL import Image

from fiber_d2.data import load_detection_json


def xml(name, objects, size=(100, 80)):
    width, height = size or ("", "")
    written = f"<size><width>{width}</width><height>{height}</height></size>" if size else ""
    return f"<annotation><filename>{name}</filename>{written}{''.join(objects)}</annotation>"


def item(name, corners, difficult=0):
    pairs = zip(("xmin", "ymin", "xmax", "ymax"), corners)
    box = "".join(f"<{key}>{value}</{key}>" for key, value in pairs)
    # A part of an object has a name and a box of its own, which are no object.
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>{part}"
        f"<bndbox>{box}</bndbox></object>"
    )


@pytest.fixture
def voc(tmp_path, write):
    root = tmp_path / "VOC"
    objects = [item("dog", (1, 1, 100, 80)), item("cat", (11, "21.5", 20, 40), difficult=1)]
    write(root / "Annotations" / "000001.xml", xml("000001.jpg", objects))
    write(root / "Annotations" / "000002.xml", xml(r"C:\me\000002.png", [], size=None))
    zebra = [item("aeroplane", (5, 5, 6, 6))]
    write(root / "Annotations" / "000003.xml", xml("000003.jpg", zebra))
    write(root / "ImageSets" / "Main" / "train.txt", "000003  1\n000001 -1\n\n")
    (root / "JPEGImages").mkdir()
    Image.new("RGB", (33, 44)).save(root / "JPEGImages" / "000002.png")
    return root


def arguments(voc, *more):
    return ["--root", str(voc), "--output", str(voc / "coco.json"), *map(str, more)]


def load(voc, *more):
    assert script.main(arguments(voc, "--overwrite", *more)) == 0
    records = load_detection_json(str(voc / "coco.json"), "images", "voc_test")
    classes = MetadataCatalog.get("voc_test").thing_classes
    MetadataCatalog.remove("voc_test")
    return records, classes


def test_all_files(voc, capsys):
    records, classes = load(voc)
    assert classes == ["aeroplane", "cat", "dog"]
    assert [r["file_name"] for r in records] == [
        f"images/{name}" for name in ("000001.jpg", "000002.png", "000003.jpg")
    ]
    assert [(r["width"], r["height"]) for r in records] == [(100, 80), (33, 44), (100, 80)]
    boxes = [[(a["bbox"], classes[a["category_id"]]) for a in r["annotations"]] for r in records]
    # Pixels 1..100 are the whole width: counted from 0, [0, 100).
    assert boxes == [
        [([0, 0, 100, 80], "dog"), ([10, 20.5, 10, 19.5], "cat")],
        [],
        [([4, 4, 2, 2], "aeroplane")],
    ]
    assert [a["iscrowd"] for a in records[0]["annotations"]] == [0, 1]
    assert "3 images, 3 boxes, 3 classes; left out: nothing" in capsys.readouterr().out


def test_zero_based(voc):
    records, _ = load(voc, "--zero-based")
    assert [a["bbox"] for a in records[0]["annotations"]] == [[1, 1, 99, 79], [11, 21.5, 9, 18.5]]


def test_lists(voc, tmp_path):
    records, _ = load(voc, "--list", "train")
    assert [r["file_name"] for r in records] == ["images/000003.jpg", "images/000001.jpg"]
    (tmp_path / "own.txt").write_text("000002\n000001")
    records, _ = load(voc, "--list", tmp_path / "own.txt")
    assert [len(r["annotations"]) for r in records] == [0, 2]


def test_difficult(voc):
    kinds = {}
    for choice in script.DIFFICULT:
        assert script.main(arguments(voc, "--overwrite", "--difficult", choice)) == 0
        entries = json.loads((voc / "coco.json").read_text())["annotations"]
        kinds[choice] = [(a["iscrowd"], a.get("ignore", 0)) for a in entries]
    assert kinds == {
        "crowd": [(0, 0), (1, 0), (0, 0)],
        "ignore": [(0, 0), (0, 1), (0, 0)],
        "keep": [(0, 0)] * 3,
        "drop": [(0, 0)] * 2,
    }


def test_class_order(voc, tmp_path, fails):
    (tmp_path / "classes.txt").write_text("dog\nbird\ncat\naeroplane\n")
    records, classes = load(voc, "--classes", tmp_path / "classes.txt")
    assert classes == ["dog", "bird", "cat", "aeroplane"]
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 2]
    (voc / "coco.json").unlink()
    wrong = arguments(voc, "--classes", tmp_path / "classes.txt")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    fails(script.main, wrong, "000003.xml", "'aeroplane'", output=voc / "coco.json")
    (tmp_path / "classes.txt").write_text("dog\ndog\n")
    fails(script.main, wrong, "classes.txt must name each class once")


def test_boxes_without_extent(voc, write, capsys):
    objects = [item("dog", (9, 9, 8, 20)), item("dog", (9, 9, 9, 9))]
    write(voc / "Annotations" / "000003.xml", xml("000003.jpg", objects))
    records, _ = load(voc)
    # One pixel from 9 to 9 has an extent of 1; from 9 to 8 has none.
    assert [a["bbox"] for a in records[2]["annotations"]] == [[8, 8, 1, 1]]
    assert "left out: 1 boxes without extent" in capsys.readouterr().out


def test_restarts(voc, restarts):
    restarts(script.main, arguments(voc), voc / "coco.json")


def test_as_a_program(voc, run_script):
    result = run_script("voc_to_coco.py", *arguments(voc))
    assert result.returncode == 0 and "3 images" in result.stdout and result.stderr == ""


def test_bad_sources(voc, write, fails):
    def check(*words, options=()):
        fails(script.main, arguments(voc, *options), *words, output=voc / "coco.json")

    path = voc / "Annotations" / "000003.xml"
    write(path, xml("000003.jpg", [item("dog", (1, 1, 2, 2))])[:-30])
    check("000003.xml is damaged")
    write(path, xml("000003.jpg", ["<object><name>dog</name></object>"]))
    check("000003.xml", "'dog'", "bndbox")
    write(path, xml("000003.jpg", [item("dog", (1, 1, "wide", 2))]))
    check("000003.xml", "wide")
    write(path, xml("000003.jpg", [item("", (1, 1, 2, 2))]))
    check("000003.xml", "no name")
    write(path, xml("000003.jpg", [], size=None))
    check("000003.xml does not give the size", "JPEGImages")
    path.unlink()
    check("000003.xml does not exist", options=("--list", "train"))
    check("none.txt does not exist", options=("--list", "none"))
    for left in (voc / "Annotations").iterdir():
        left.unlink()
    check("holds no XML files")
