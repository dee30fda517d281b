"""Mixed without the images of RefCOCO's val and test splits, however a file names them."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import refexp_clean as script


def caption(key, file_name, **more):
    return {
        "id": key,
        "file_name": file_name,
        "width": 50,
        "height": 40,
        "caption": "a dog",
        **more,
    }


# COCO ids 11, 22, 33 and 44 are evaluated on; those images are to go.
GONE = [
    caption(1, "COCO_train2014_000000000011.jpg", data_source="coco", original_id=11),
    caption(2, "COCO_train2014_000000000011.jpg", data_source="coco"),
    caption(3, "train2017/000000000022.jpg", data_source="coco"),
    caption(4, "22.jpg", data_source="coco"),
    caption(5, "renamed.jpg", data_source="coco", original_img_id=33),
    caption(6, "9001.jpg", data_source="vg", original_img_id=9001),  # is 44 by image_data.json
    caption(7, "33.jpg", data_source="vg", coco_id=44),
]
STAY = [
    caption(8, "COCO_train2014_000000000111.jpg", data_source="coco", original_id=111),
    caption(9, "11.jpg", data_source="vg", original_img_id=11),  # Visual Genome's 11 is no COCO's
    caption(10, "9002.jpg", data_source="vg", original_img_id=22),
    caption(11, "9003.jpg", data_source="vg", coco_id=None),
]
IMAGE_DATA = [
    {"image_id": key, "width": 50, "height": 40, "coco_id": coco_id}
    for key, coco_id in [(9001, 44), (9002, 45), (11, None)]
]
REFS = [
    {"ref_id": 1, "ann_id": 1, "image_id": 11, "split": "testA", "sentences": []},
    {"ref_id": 2, "ann_id": 2, "image_id": 111, "split": "train", "sentences": []},
    {"ref_id": 3, "ann_id": 3, "image_id": 22, "split": "val", "sentences": []},
]


@pytest.fixture
def source(tmp_path, write):
    images = [image for pair in zip(STAY, GONE) for image in pair] + GONE[len(STAY) :]
    boxes = [
        {
            "id": 10 * image["id"] + k,
            "image_id": image["id"],
            "bbox": [k, 1, 5, 5],
            "tokens_positive": [[2, 5]],
        }
        for image in images
        for k in range(image["id"] % 3 + 1)
    ]
    content = {"info": {"x": 1}, "images": images, "annotations": boxes, "categories": []}
    write(tmp_path / "mixed.json", content)
    write(tmp_path / "image_data.json", IMAGE_DATA)
    val = {
        "images": [
            caption(1, "COCO_train2014_000000000033.jpg"),
            caption(2, "x.jpg", original_id=44),
        ]
    }
    write(tmp_path / "finetune_refcoco_val.json", val)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFS, 2))
    return tmp_path


def arguments(source, *more, exclude=("finetune_refcoco_val.json", "refs(unc).p"), data=True):
    files = ["--mixed", source / "mixed.json", "--output", source / "out.json"]
    found = ["--image-data", source / "image_data.json"] if data else []
    excluded = ["--exclude", *(source / name for name in exclude)]
    return [str(part) for part in (*files, *found, *excluded, *more)]


def test_what_goes_and_what_stays(source, read_grounding, capsys):
    before = json.loads((source / "mixed.json").read_text())
    assert script.main(arguments(source)) == 0
    after = json.loads((source / "out.json").read_text())
    assert after["images"] == STAY
    kept = {image["id"] for image in STAY}
    assert after["annotations"] == [a for a in before["annotations"] if a["image_id"] in kept]
    assert after["info"] == before["info"]
    boxes = len(before["annotations"]) - len(after["annotations"])
    line = f"4 COCO images of val and test, 7 captions about them, {boxes} boxes of those"
    assert line in capsys.readouterr().out
    assert len(read_grounding(source / "out.json")) == len(STAY)


def test_only_what_the_files_name(source):
    assert script.main(arguments(source, exclude=("finetune_refcoco_val.json",))) == 0
    left = {image["id"] for image in json.loads((source / "out.json").read_text())["images"]}
    assert left == {1, 2, 3, 4, 8, 9, 10, 11}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("COCO_train2014_000000000123.jpg", 123),
        ("COCO_val2014_000000000123.jpg", 123),
        ("COCO_train2014_000000581857_16.jpg", 581857),
        ("train2017/000000000123.jpg", 123),
        ("000000000123.png", 123),
        ("123.jpg", None),
        ("000123.jpg", None),
        ("COCO_train2014_12.jpg", None),
        ("photo.jpg", None),
    ],
)
def test_coco_ids_of_names(name, expected):
    assert script.coco_id_of_name(name) == expected


def test_restarts(source, restarts):
    restarts(script.main, arguments(source), source / "out.json")


def test_as_a_program(source, run_script):
    done = run_script("refexp_clean.py", *arguments(source))
    assert done.returncode == 0 and done.stderr == "" and "4 captions" in done.stdout


def test_bad_sources(source, write, fails):
    good = json.loads((source / "mixed.json").read_text())

    def check(*words, content=good, **options):
        write(source / "mixed.json", content)
        fails(script.main, arguments(source, **options), *words, output=source / "out.json")

    def changed(place, **values):
        content = copy.deepcopy(good)
        content["images"][place].update(values)
        return content

    # Whether COCO has an image must be known, or the data would not be clean.
    check("image 9", "give --image-data", data=False)
    unknown = changed(2, file_name="777.jpg")
    check("image 9", "image_data.json has no image 777", content=unknown)
    nowhere = copy.deepcopy(good)
    del nowhere["images"][2]["data_source"]
    check("image 9", "no data_source", content=nowhere)
    del nowhere["images"][2]["file_name"]
    check("image of", "no file_name", content=nowhere)
    check("image 5", "neither its name", content=changed(8, original_img_id=None))
    check("no list 'annotations'", content={"images": []})
    write(source / "finetune_refcoco_train.json", {"images": [caption(1, "x.jpg", original_id=1)]})
    check("training expressions", exclude=("finetune_refcoco_train.json",))
    write(source / "other.json", {"images": [caption(1, "x.jpg")]})
    check("other.json does not give the COCO ids", exclude=("other.json",))
    check("none.json does not exist", exclude=("none.json",))
    (source / "refs(unc).p").write_bytes(pickle.dumps(REFS[1:2]))
    check("refs(unc).p does not give the COCO ids", exclude=("refs(unc).p",))
