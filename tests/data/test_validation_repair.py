"""Repaired copies, and that readers accept what the validator accepts."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fiber_d2.data import load_detection_json, load_grounding_json
from fiber_d2.data.readers import load_lvis_json
from fiber_d2.data.shapes import prepare_shapes
from fiber_d2.data.validation import (
    CHECKS,
    Options,
    errors_after_repair,
    repair,
    source_of_json,
    validate,
)
from fiber_d2.text import load_tokenizer

TOKENIZER = load_tokenizer("shapes")
OPTIONS = Options(TOKENIZER, workers=0)


def validated(content, folder, root, kind, options=OPTIONS):
    """Source and report of a content, written to a file; "lvis" is a kind here."""
    path = os.path.join(folder, "content.json")
    Path(path).write_text(json.dumps(content))
    lvis = kind == "lvis"
    source = source_of_json(path, root, kind="detection" if lvis else kind, with_masks=True)
    source.file_format = "lvis" if lvis else "coco"
    return source, validate([source], options)


def test_each_repair(coco, tmp_path):
    content, _, root = coco
    good = copy.deepcopy(content)
    images, boxes, categories = (content[k] for k in ("images", "annotations", "categories"))
    os.remove(f"{root}/1.png")
    Path(root, "2.png").write_bytes(b"broken")
    images[3]["file_name"] = "../3.png"
    images[4]["width"] = 77
    categories.insert(0, {"id": 0, "name": "background"})
    boxes[0]["bbox"] = [-2, 20, 10, 20]
    boxes[0]["area"] = 200
    boxes[1]["bbox"] = [1, 2, float("inf"), 3]
    boxes[6]["id"] = 1
    boxes += [
        {"id": 20, "image_id": 99, "bbox": [1, 1, 2, 2], "category_id": 7},
        {"id": 21, "image_id": 10, "bbox": [1, 1, 2, 2], "category_id": 99},
        {"id": 22, "image_id": 10, "bbox": [50, 1, 2, 2], "category_id": 7},
        {"id": 23, "image_id": 10, "bbox": [5, 1, 2, 0], "category_id": 7},
    ]
    source, report = validated(content, tmp_path, root, None)
    before = copy.deepcopy(source.content)
    repaired, counts = repair(source, report.facts)
    # NaN is not equal to itself; as text it is.
    assert json.dumps(source.content) == json.dumps(before)
    assert +counts == {
        "image-dropped": 3,
        "image-resized": 1,
        "annotation-of-dropped-image": 3,
        "annotation-of-unknown-image": 1,
        "annotation-of-unknown-category": 1,
        "box-dropped": 3,
        "box-clipped": 2,
        "annotation-renumbered": 1,
        "category-dropped": 1,
    }
    assert [image["id"] for image in repaired["images"]] == [10, 14, 15]
    assert repaired["images"][1]["width"] == 30
    assert repaired["categories"] == good["categories"]
    clipped, other, last = repaired["annotations"]
    assert (clipped["bbox"], clipped["area"]) == ([0, 20, 8, 10], 80)
    assert other["bbox"] == [30, 20, 10, 10]
    assert last["id"] == 4 and last["image_id"] == 14
    assert errors_after_repair(source, repaired, report.facts, OPTIONS) == []


def test_repaired_spans(grounding, tmp_path):
    content, _, root = grounding
    image, tied = content["images"][0], content["annotations"]
    end = len(image["caption"])
    tied[0]["tokens_positive"] = [[0, 7], [22, end + 9], [end, end + 2], [5, 5], [7, 4], [-1, 3]]
    tied[1]["tokens_positive"] = [[3, 4]]  # a space: no token, and not to be repaired
    image["tokens_positive_eval"] = [[[0, 99]], [[90, 99]]]
    source, report = validated(content, tmp_path, root, "grounding")
    repaired, counts = repair(source, report.facts)
    assert repaired["annotations"][0]["tokens_positive"] == [[0, 7], [22, end]]
    assert repaired["images"][0]["tokens_positive_eval"] == [[[0, end]], []]
    assert (counts["span-dropped"], counts["span-clipped"]) == (5, 2)
    remaining = errors_after_repair(source, repaired, report.facts, OPTIONS)
    assert [(f.check, f.annotation_id) for f in remaining] == [("span-no-token", 2)]


def test_what_is_not_certain_stays(coco, tmp_path):
    """Without a look at the files no image is dropped, and a good file is not changed."""
    content, _, root = coco
    content["annotations"][2]["bbox"] = [20, 10, 20, 20]
    os.remove(f"{root}/1.png")
    content["images"][2]["width"] = "wide"
    options = Options(TOKENIZER, workers=0, read_images=False)
    source, report = validated(content, tmp_path, root, None, options)
    repaired, counts = repair(source, report.facts)
    assert repaired == content and not +counts
    source, _ = validated({"images": []}, tmp_path, root, "detection")
    with pytest.raises(ValueError, match="cannot be repaired"):
        repair(source, {})


def test_a_background_that_is_used_stays(coco, tmp_path):
    content, _, root = coco
    content["categories"][0]["name"] = "background"
    source, report = validated(content, tmp_path, root, None)
    repaired, _ = repair(source, report.facts)
    assert repaired["categories"] == content["categories"]


def test_boxes_of_before_a_rotation_are_not_cut_to_the_turned_size(coco, tmp_path):
    from PIL import Image

    content, _, root = coco
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(f"{root}/0.png") as image:
        image.convert("RGB").save(f"{root}/0.png", exif=exif)
    source, report = validated(content, tmp_path, root, None)
    repaired, _ = repair(source, report.facts)
    assert repaired["images"][0] == content["images"][0]
    remaining = errors_after_repair(source, repaired, report.facts, OPTIONS)
    assert [f.check for f in remaining] == ["image-rotated-size"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return Path(prepare_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=6, num_val=3))


SHAPES = {
    "detection": "instances",
    "grounding": "final_flickr_separateGT",
    "refexp": "finetune_shapes",
    "lvis": "lvis",
}


@pytest.mark.parametrize("kind", SHAPES)
def test_generated_data_are_valid(kind, shapes):
    sources = [
        source_of_json(
            f"{shapes}/annotations/{SHAPES[kind]}_{split}.json",
            f"{shapes}/images" + ("" if kind == "lvis" else f"/{split}"),
            kind=None if kind == "lvis" else kind,
        )
        for split in ("train", "val")
    ]
    report = validate(sources, OPTIONS)
    assert not [f for f in report.findings if f.level != "info"]
    assert len(report.facts) == 9


# Random damage: values of any type in the place of any value, and entries lost or repeated.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 60),
    st.floats(-50, 50),
    st.sampled_from(
        [
            float("nan"),
            float("inf"),
            10**400,
            1e308,
            "10",
            "",
            "a\0b",
            "../x",
            ".",
            "\ud800",
            "http://[a/b",
        ]
    ),
    st.lists(st.integers(-3, 50), max_size=5),
    st.lists(st.lists(st.integers(-3, 40), min_size=2, max_size=2), max_size=3),
    st.lists(st.floats(-90, 90), min_size=4, max_size=4),
    st.just({}),
)


@st.composite
def damages(draw):
    kinds = ["set", "set", "set", "delete", "replace", "repeat", "drop"]
    return [
        (
            draw(st.sampled_from(["images", "annotations", "categories"])),
            draw(st.sampled_from(kinds)),
            draw(st.integers(0, 50)),
            draw(st.integers(0, 50)),
            draw(VALUES),
        )
        for _ in range(draw(st.integers(0, 4)))
    ]


def apply(content, steps):
    for name, what, index, place, value in steps:
        entries = content.get(name)
        if not isinstance(entries, list) or not entries:
            continue
        index %= len(entries)
        entry = entries[index]
        if what == "replace":
            if place < 3:
                content[name] = value
            else:
                entries[index] = value
        elif what == "repeat":
            entries.append(copy.deepcopy(entry))
        elif what == "drop":
            del entries[index]
        elif isinstance(entry, dict) and entry:
            key = sorted(entry)[place % len(entry)]
            if what == "set":
                entry[key] = value
            else:
                del entry[key]


LOADERS = {
    "detection": load_detection_json,
    "lvis": load_lvis_json,
    "grounding": load_grounding_json,
    "refexp": load_grounding_json,
}


@pytest.mark.parametrize("kind", SHAPES)
@given(steps=damages())
@example(steps=[("images", "set", 0, 14, 2)])  # two images of one id
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_passes_can_be_read_and_what_is_repaired_stays_so(kind, steps, shapes):
    content = json.loads((shapes / f"annotations/{SHAPES[kind]}_val.json").read_text())
    apply(content, steps)
    root = f"{shapes}/images" + ("" if kind == "lvis" else "/val")
    with tempfile.TemporaryDirectory() as folder:
        source, report = validated(content, folder, root, kind)
        assert report.stopped is None
        if not report.has_errors:
            LOADERS[kind](source.json_file, root)
        try:
            repaired, counts = repair(source, report.facts)
        except ValueError:
            assert "lists" in report.counts()
            return
    remaining = errors_after_repair(source, repaired, report.facts, OPTIONS)
    assert not [f for f in remaining if CHECKS[f.check].fixable]
    if not report.has_errors and not report.counts()["category-background"]:
        assert not set(+counts) - {"box-clipped"}
    source.content = repaired
    again, counts = repair(source, report.facts)
    assert not +counts and json.dumps(again) == json.dumps(repaired)
