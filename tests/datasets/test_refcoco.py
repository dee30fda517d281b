"""REFER: pickles of Python 2 and 3 and json; expressions, roots and boxes."""

from __future__ import annotations

import json
import os
import pickle
import pickletools

import numpy as np
import pytest
import refcoco as script
import refer
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.data.shapes import prepare_shapes

REFS = [
    {
        "ref_id": 1,
        "ann_id": 71,
        "image_id": 581857,
        "split": "train",
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "category_id": 1,
        "sent_ids": [0, 1],
        "sentences": [
            {
                "sent_id": 0,
                "sent": "the  lady with the blue shirt",
                "raw": "THE LADY",
                "tokens": [],
            },
            {"sent_id": 1, "sent": "left lady", "raw": "left lady", "tokens": []},
        ],
    },
    {
        "ref_id": 2,
        "ann_id": 72,
        "image_id": 9,
        "split": "testA",
        "file_name": "COCO_train2014_000000000009_3.jpg",
        "category_id": 1,
        "sent_ids": [2, 3],
        "sentences": [{"sent_id": 2, "sent": "café sign"}, {"sent_id": 3, "sent": " "}],
    },
]
INSTANCES = {
    "images": [
        {
            "id": 581857,
            "file_name": "COCO_train2014_000000581857.jpg",
            "width": 640,
            "height": 480,
        },
        {"id": 9, "width": 300, "height": 200},
    ],
    "annotations": [
        {"id": 71, "image_id": 581857, "bbox": [10.5, 20.0, 30, 40], "area": 700.5, "iscrowd": 0},
        {"id": 72, "image_id": 9, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "person"}],
}


@pytest.fixture
def source(tmp_path, write):
    write(tmp_path / "instances.json", INSTANCES)
    with open(tmp_path / "refs(unc).p", "wb") as file:
        pickle.dump(REFS, file, protocol=2)
    return tmp_path


def arguments(source, *more, refs="refs(unc).p"):
    paths = ["--refs", source / refs, "--instances", source / "instances.json"]
    return ["--dataset", "refcoco", "--output", source / "out", *paths, *more]


def run(source, *more, refs="refs(unc).p"):
    return script.main([str(part) for part in arguments(source, *more, refs=refs)])


def test_sentences_and_boxes(source, read_grounding, spelled, capsys):
    assert run(source) == 0
    train = read_grounding(source / "out" / "finetune_refcoco_train.json")
    assert [record["caption"] for record in train] == ["the lady with the blue shirt", "left lady"]
    for record in train:
        (annotation,) = record["annotations"]
        assert spelled(record, annotation["tokens_positive"]) == [record["caption"]]
        assert annotation["bbox"] == [10.5, 20, 30, 40] and annotation["iscrowd"] == 0
        assert record["file_name"] == "images/COCO_train2014_000000581857.jpg"
        assert (record["width"], record["height"]) == (640, 480)
        assert (record["dataset_name"], record["original_id"]) == ("refcoco", 581857)
    (test,) = read_grounding(source / "out" / "finetune_refcoco_testA.json")
    assert test["caption"] == "café sign"
    # That image has no name in the instances: REFER's is used, without its annotation's number.
    assert test["file_name"] == "images/COCO_train2014_000000000009.jpg"
    raw = json.loads((source / "out" / "finetune_refcoco_train.json").read_text())
    assert len({image["id"] for image in raw["images"]}) == 2
    assert raw["annotations"][0]["area"] == 700.5
    assert raw["images"][0]["tokens_negative"] == [[0, 28]]
    out = capsys.readouterr().out
    assert "1 images, 2 sentences, 1 boxes; left out: nothing" in out
    assert "1 images, 1 sentences, 1 boxes; left out: 1 sentences without words" in out


def test_json_and_pickles_of_all_kinds_read_the_same(source, write):
    write(source / "refs.json", REFS)
    expected = refer.read_refs(source / "refs.json")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = source / f"{protocol}.p"
        path.write_bytes(pickle.dumps(REFS, protocol))
        assert refer.read_refs(path) == expected == REFS


def test_pickles_of_python_2(tmp_path):
    # Byte strings in UTF-8 as Python 2 wrote them; nothing in Python 3 does.
    text = "à café".encode()  # the second byte of à is a space in Latin-1
    binary = b"\x80\x02](U\x03abcU" + bytes([len(text)]) + text + b"K\x07e."
    pickletools.dis(binary, out=open(os.devnull, "w"))
    (tmp_path / "2.p").write_bytes(binary)
    assert refer.load_plain_pickle(tmp_path / "2.p") == ["abc", "à café", 7]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_numpy_scalars_become_numbers(protocol, tmp_path):
    values = [np.int64(-5), np.float32(0.5), np.uint8(200), np.bool_(True), np.array(3, ">i4")[()]]
    (tmp_path / "n.p").write_bytes(pickle.dumps(values, protocol))
    loaded = refer.load_plain_pickle(tmp_path / "n.p")
    assert loaded == [-5, 0.5, 200, True, 3]
    assert [type(value) for value in loaded] == [int, float, int, bool, int]


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, argument, named",
    [
        (os.system, "touch {}", "system"),
        (eval, "open({!r}, 'w')", "eval"),
        (getattr, "x", "getattr"),
        (np.array, [1], "numpy"),
    ],
)
def test_pickles_that_ask_for_more_are_refused(function, argument, named, source, fails):
    mark = source / "mark"
    argument = argument.format(str(mark)) if isinstance(argument, str) else argument
    attack = Attack(function, argument, "y") if function is getattr else Attack(function, argument)
    (source / "refs(unc).p").write_bytes(pickle.dumps([attack]))
    fails(script.main, arguments(source), "refs(unc).p", "asks for", named, output=source / "out")
    assert not mark.exists()


def test_numpy_objects_are_refused(tmp_path):
    (tmp_path / "n.p").write_bytes(pickle.dumps(np.dtype("O")))
    with pytest.raises(ValueError, match="numpy data of type 'O8'"):
        refer.load_plain_pickle(tmp_path / "n.p")


ROOTS = {
    "the lady with the blue shirt": "the lady",
    "left lady": "left lady",
    "the man left of the tree": "the man",
    "guy on the right, in red": "guy",
    "the next man": "the next man",
    "the woman next to him": "the woman",
    "woman, wearing a hat": "woman",
    "the standing man": "the standing man",
    "on the left": "on the left",
    "a boy who is sitting": "a boy",
    "in front of the car": "in front",
    "Pizza": "Pizza",
    "the": "the",
}


@pytest.mark.parametrize("expression", ROOTS)
def test_roots(expression):
    assert expression[: script.root_length(expression)] == ROOTS[expression]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abo,'é", min_size=1, max_size=5) | st.sampled_from(["the", "on", "left"])))
def test_roots_end_behind_a_word(words):
    expression = " ".join(["thing", *words])
    root = expression[: script.root_length(expression)]
    assert root and expression.startswith(root) and root.strip() == root
    rest = expression[len(root) :].lstrip(",;:.")
    assert rest == "" or rest.startswith(" ")


def test_roots_of_the_generated_expressions(tmp_path, write, read_grounding, spelled):
    prepare_shapes(tmp_path / "shapes", num_train=12, num_val=1, image_size=96)
    path = tmp_path / "shapes" / "annotations" / "finetune_shapes_train.json"
    content = json.loads(path.read_text())
    instances = {"images": [], "annotations": []}
    refs = []
    for image, annotation in zip(content["images"], content["annotations"]):
        key = image["original_id"]
        instances["images"].append({**image, "id": key})
        instances["annotations"].append({**annotation, "image_id": key})
        ids = {"ref_id": image["id"], "ann_id": annotation["id"], "image_id": key, "split": "val"}
        refs.append({**ids, "sentences": [{"sent": image["caption"]}]})
    write(tmp_path / "instances.json", instances)
    write(tmp_path / "refs.json", refs)
    assert run(tmp_path, "--target", "root", refs="refs.json") == 0
    ours = read_grounding(tmp_path / "out" / "finetune_refcoco_val.json")
    theirs = read_grounding(path)
    assert len(ours) > 20 and len({len(r["annotations"][0]["tokens_positive"]) for r in ours}) == 1
    for one, other in zip(ours, theirs):
        for key in ("caption", "original_id", "width", "height"):
            assert one[key] == other[key]
        (found,), (expected,) = one["annotations"], other["annotations"]
        assert found["bbox"] == expected["bbox"]
        # The generated ones name the side as well ("left of"), behind the root.
        assert found["tokens_positive"] == expected["tokens_positive"][:1]


def test_restarts_and_chosen_splits(source, restarts):
    output = source / "out" / "finetune_refcoco_testA.json"
    restarts(script.main, arguments(source, "--splits", "testA"), output)
    assert not (source / "out" / "finetune_refcoco_train.json").exists()


def test_as_a_program(source, run_script):
    result = run_script("refcoco.py", *arguments(source))
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.count("finetune_refcoco_") == 2
    result = run_script("refcoco.py", *arguments(source, "--splits", "testB"))
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert "has no split testB: it has testA, train" in result.stderr


def test_bad_sources(source, fails, write):
    def check(*words, refs="refs.json"):
        fails(script.main, arguments(source, refs=refs), *words)

    check("nothing.p does not exist", refs="nothing.p")
    write(source / "refs.json", [{**REFS[0], "ann_id": 99}])
    check("ref 1", "annotation 99", "instances.json")
    write(source / "refs.json", [{**REFS[0], "image_id": 98}])
    check("ref 1", "image 98", "instances.json")
    write(source / "refs.json", [{**REFS[0], "image_id": 9}])
    check("ref 1", "annotation 71", "image 9", "581857")
    write(source / "refs.json", [{**REFS[0], "sentences": [{"raw": "x"}]}])
    check("sentence of the ref 1 has no sent")
    write(source / "refs.json", [{**REFS[0], "sentences": [{"sent": 5}]}])
    check("sentence of the ref 1 has 5 instead of a text")
    write(source / "refs.json", [{key: REFS[0][key] for key in ("ref_id", "ann_id", "split")}])
    check("place 0", "image_id, sentences")
    write(source / "refs.json", {})
    check("no list of refs")
    data = (source / "refs(unc).p").read_bytes()
    (source / "refs(unc).p").write_bytes(data[: len(data) // 2])
    check("refs(unc).p", "damaged", refs="refs(unc).p")
    write(source / "refs.json", REFS)
    broken = json.loads(json.dumps(INSTANCES))
    del broken["annotations"][0]["bbox"]
    write(source / "instances.json", broken)
    check("annotation 71 has no bbox")
    write(source / "instances.json", json.dumps(INSTANCES)[:100])
    check("instances.json is damaged")
