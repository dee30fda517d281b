"""Visual Genome, GQA and RefCOCO -> Mixed: phrases, boxes, budgets, COCO's images."""

from __future__ import annotations

import json
from collections import Counter

import mixed as script
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

IMAGE_DATA = [
    {"image_id": 1, "width": 100, "height": 80, "coco_id": None, "url": "x", "flickr_id": None},
    {"image_id": 2, "width": 60, "height": 60, "coco_id": 123, "url": "x", "flickr_id": None},
    {"image_id": 3, "width": 60, "height": 60, "coco_id": None, "url": "x", "flickr_id": None},
]


def region(phrase, x, y, width, height):
    box = {"x": x, "y": y, "width": width, "height": height}
    return {"region_id": 9, "image_id": 1, "phrase": phrase, **box}


REGIONS = [
    {
        "id": 1,
        "regions": [
            region("A brown dog.", 10, 10, 20, 20),
            region("the sky", -5, 0, 200, 30),  # leaves the image
            region("a  brown\tdog", 60, 10, 20, 20),  # another dog
            region("a brown dog", 10, 10, 20, 19),  # the first again: IoU 0.95
            region("an animal", 10, 10, 20, 20),  # the first box by another name
            region(" . ", 1, 1, 5, 5),
            region("nothing", 5, 5, 0, 9),
            region("outside", 101, 5, 9, 9),
        ],
    },
    {"id": 2, "regions": [region("a COCO cat", 1, 1, 9, 9)]},
]


def thing(name, x, y, w, h, *attributes):
    box = {"x": x, "y": y, "w": w, "h": h}
    return {"name": name, **box, "attributes": list(attributes), "relations": []}


GRAPHS = {
    "1": {"width": 100, "height": 80, "objects": {"8": thing("kite", 0, 0, 9, 9, "small", "red")}},
    "3": {"width": 60, "height": 60, "objects": {"9": thing("road", 0, 30, 60, 30)}},
    "n4": {"width": 60, "height": 60, "objects": {"7": thing("bus", 5, 5, 9, 9)}},
}
REFS = {
    "images": [
        {
            "id": key,
            "file_name": f"COCO_train2014_{coco_id:012}.jpg",
            "caption": caption,
            "original_id": coco_id,
            "width": 90,
            "height": 70,
        }
        for key, coco_id, caption in [(1, 55, "left man"), (2, 55, "a man"), (3, 66, "right cup")]
    ],
    "annotations": [
        {"id": key, "image_id": key, "bbox": box, "tokens_positive": [[0, 4]]}
        for key, box in [(1, [1.5, 2, 30, 40]), (2, [1.5, 2, 30, 40]), (3, [9, 9, 8, 8])]
    ],
}


@pytest.fixture
def source(tmp_path, write):
    write(tmp_path / "regions.json", REGIONS)
    write(tmp_path / "image_data.json", IMAGE_DATA)
    write(tmp_path / "graphs.json", GRAPHS)
    write(tmp_path / "refs.json", REFS)
    return tmp_path


FLAGS = {
    "regions": "--regions",
    "image_data": "--image-data",
    "graphs": "--scene-graphs",
    "refs": "--refs",
}


def arguments(source, *names, more=()):
    given_files = [part for name in names for part in (FLAGS[name], source / f"{name}.json")]
    return [str(part) for part in (*given_files, "--output", source / "out.json", *more)]


def boxes_by_words(record, spelled):
    """box -> the phrases it is tied to."""
    entries = record["annotations"]
    found = {tuple(a["bbox"]): spelled(record, a["tokens_positive"]) for a in entries}
    assert len(found) == len(entries)
    return found


def test_all_sources(source, read_grounding, spelled, capsys):
    assert script.main(arguments(source, *FLAGS)) == 0
    records = read_grounding(source / "out.json")
    raw = json.loads((source / "out.json").read_text())["images"]
    assert [record["caption"] for record in records] == [
        "A brown dog. the sky. an animal. small red kite",
        "a COCO cat",
        "road",
        "bus",
        "left man. a man",
        "right cup",
    ]
    assert boxes_by_words(records[0], spelled) == {
        (10, 10, 20, 20): ["A brown dog", "an animal"],
        (60, 10, 20, 20): ["A brown dog"],
        (0, 0, 100, 30): ["the sky"],
        (0, 0, 9, 9): ["small red kite"],
    }
    assert boxes_by_words(records[4], spelled) == {(1.5, 2, 30, 40): ["left man", "a man"]}
    assert [r["file_name"].split("/")[1] for r in records] == [
        *("1.jpg", "2.jpg", "3.jpg", "n4.jpg"),
        *("COCO_train2014_000000000055.jpg", "COCO_train2014_000000000066.jpg"),
    ]
    assert [image["data_source"] for image in raw] == ["vg"] * 4 + ["coco"] * 2
    assert [image["original_img_id"] for image in raw] == [1, 2, 3, "n4", 55, 66]
    # What image_data.json does not know is not said to be no image of COCO.
    assert [image.get("coco_id", "?") for image in raw[:4]] == [None, 123, None, "?"]
    out = capsys.readouterr().out
    assert "6 images, 6 captions, 9 boxes" in out
    for words in (
        "1 phrases without words",
        "2 boxes without extent in the image",
        "1 repeated boxes of a phrase",
    ):
        assert words in out


def test_without_coco(source, read_grounding, capsys):
    names = ("regions", "image_data", "graphs")
    assert script.main(arguments(source, *names, more=["--no-coco"])) == 0
    captions = [record["caption"] for record in read_grounding(source / "out.json")]
    assert captions == ["A brown dog. the sky. an animal. small red kite", "road"]
    out = capsys.readouterr().out
    assert "1 images of COCO, 1 images of which image_data.json does not say" in out


@pytest.mark.parametrize("names", [("graphs",), ("refs",), ("regions", "image_data")])
def test_each_source_alone(names, source, read_grounding):
    assert script.main(arguments(source, *names)) == 0
    assert len(read_grounding(source / "out.json")) == {"graphs": 3}.get(names[0], 2)


def test_word_budget(source, read_grounding, capsys):
    assert script.main(arguments(source, "graphs", "refs", more=["--max-words", "2"])) == 0
    captions = [record["caption"] for record in read_grounding(source / "out.json")]
    assert captions == ["road", "bus", "left man", "a man", "right cup"]
    assert "1 phrases of too many words, 1 images without a phrase" in capsys.readouterr().out


BOXES = st.tuples(st.integers(-5, 40), st.integers(-5, 40), st.integers(0, 30), st.integers(0, 30))
WORDS = st.lists(st.sampled_from(["a", "Red", "red", "dog", "käse", "."]), min_size=1, max_size=4)
PHRASES = st.lists(st.tuples(WORDS.map(" ".join), BOXES.map(list)), max_size=12)


@settings(max_examples=80, deadline=None)
@given(PHRASES, st.integers(1, 8))
def test_every_box_is_tied_to_its_phrase(phrases, max_words):
    output, left_out = script.GroundingFile("test"), Counter()
    entry = {"file_name": "a.jpg", "width": 40, "height": 30}
    image = script.DescribedImage(entry, phrases)
    script.add_image(output, image, max_words, left_out)

    found = set()
    captions = {image["id"]: image["caption"] for image in output.images}
    for caption in captions.values():
        assert len(caption.replace(script.SEPARATOR, " ").split()) <= max_words
    for annotation in output.annotations:
        caption = captions[annotation["image_id"]]
        for begin, end in annotation["tokens_positive"]:
            assert caption[begin - 2 : begin] in ("", ". ") and caption[end : end + 2] in ("", ". ")
            found.add((caption[begin:end].lower(), tuple(annotation["bbox"])))
    expected = set()
    for text, (x, y, w, h) in phrases:
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, 40), min(y + h, 30)
        words = text.strip(" .").lower()
        if words and len(words.split()) <= max_words and x2 > x1 and y2 > y1:
            expected.add((words, (x1, y1, x2 - x1, y2 - y1)))
    assert found <= expected
    assert {words for words, _ in found} == {words for words, _ in expected}
    for words, box in expected - found:
        assert max(iou(box, other) for text, other in found if text == words) > 0.9
    for words, box in found:
        overlaps = [iou(box, b) for text, b in found if text == words and b != box]
        assert max(overlaps, default=0) <= 0.9


def iou(one, other):
    begin = np.maximum(one[:2], other[:2])
    end = np.minimum(np.add(one[:2], one[2:]), np.add(other[:2], other[2:]))
    both = np.prod(np.maximum(end - begin, 0))
    return both / (np.prod(one[2:]) + np.prod(other[2:]) - both)


def test_restarts(source, restarts):
    restarts(script.main, arguments(source, *FLAGS), source / "out.json")


def test_as_a_program(source, run_script):
    done = run_script("mixed.py", *arguments(source, *FLAGS))
    assert done.returncode == 0 and done.stderr == "" and "6 captions" in done.stdout


def test_bad_sources(source, write, fails):
    def check(*words, names=("regions", "image_data"), more=(), **files):
        for name, content in files.items():
            write(source / f"{name}.json", content)
        command = arguments(source, *names, more=more)
        fails(script.main, command, *words, output=source / "out.json")

    check("Name a source", names=())
    check("--no-coco", names=("refs", "image_data"), more=["--no-coco"])
    check("need --image-data", names=("regions",))
    check("--max-words", more=["--max-words", "0"])
    check("image 1", "not in", "image_data.json", image_data=IMAGE_DATA[1:])
    check(
        "place 1",
        "no coco_id",
        image_data=[IMAGE_DATA[0], {"image_id": 2, "width": 1, "height": 1}],
    )
    check("holds no list", image_data={"a": 1})
    check("size (0, 80)", "image 1", image_data=[{**IMAGE_DATA[0], "width": 0}])
    check("holds no list of images", regions={"a": 1}, image_data=IMAGE_DATA)
    bad = region("a dog", 1, 2, "3", 4)
    check("image 1", "'a dog'", "box", regions=[{"id": 1, "regions": [bad]}])
    check(
        "image 1", "a region has None", regions=[{"id": 1, "regions": [region(None, 1, 2, 3, 4)]}]
    )
    check("image 1 has no regions", regions=[{"id": 1}])
    check(
        "'../1' is no id",
        regions=[{"id": "../1", "regions": []}],
        image_data=[{**IMAGE_DATA[0], "image_id": "../1"}],
    )
    check("regions.json is damaged", regions=json.dumps(REGIONS)[:-20])
    check(
        "image 5: the object 8 has no h",
        names=("graphs",),
        graphs={
            "5": {"width": 5, "height": 5, "objects": {"8": {"name": "a", "x": 1, "y": 1, "w": 1}}}
        },
    )
    check("no object by image ids", names=("graphs",), graphs=[])
    check("Nothing is left", names=("graphs",), graphs={})
    check("annotation 1", "image 1", names=("refs",), refs={**REFS, "images": []})
    check(
        "image 1 has no original_id",
        names=("refs",),
        refs={
            "annotations": [],
            "images": [{"id": 1, "caption": "x", "file_name": "x", "width": 1, "height": 1}],
        },
    )
