"""Flickr30k Entities: captions, phrases and boxes as in the source, and as the evaluator counts."""

from __future__ import annotations

import json

import flickr30k_entities as script
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.data.shapes import prepare_shapes
from fiber_d2.evaluation import phrase_recall
from fiber_d2.evaluation.entities import parse_sentences, read_entities

# One object of two names, an entity of two boxes, a scene, and one that no sentence names.
XML = """<annotation>
  <filename>36979.jpg</filename>
  <size><width>60</width><height>40</height><depth>3</depth></size>
  <object><name>11</name><scene>1</scene><nobndbox>1</nobndbox></object>
  <object><name>12</name><name>13</name>
    <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>21</xmax><ymax>32</ymax></bndbox></object>
  <object><name>13</name>
    <bndbox><xmin>30</xmin><ymin>5</ymin><xmax>50</xmax><ymax>25</ymax></bndbox></object>
  <object><name>14</name>
    <bndbox><xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>
</annotation>"""
SENTENCES = (
    "[/EN#12/people An older man] walks  with [/EN#13/people/clothing two people] at "
    "[/EN#11/scene the beach] .\n"
    "\n"
    "Nothing is marked here .\n"
    "[/EN#13/people They] see [/EN#12/people him] and [/EN#0/notvisual it] , "
    "[/EN#12/people him ] .\n"
)


@pytest.fixture
def entities(tmp_path, write):
    root = tmp_path / "entities"
    write(root / "val.txt", "36979\n")
    write(root / "Annotations" / "36979.xml", XML)
    write(root / "Sentences" / "36979.txt", SENTENCES)
    return root


def arguments(root, output, *more):
    return ["--entities", str(root), "--output", str(output), "--splits", "val", *more]


def test_captions_phrases_and_boxes(entities, tmp_path, read_grounding, spelled, capsys):
    assert script.main(arguments(entities, tmp_path)) == 0
    records = read_grounding(tmp_path / "final_flickr_separateGT_val.json")
    assert [record["caption"] for record in records] == [
        "An older man walks with two people at the beach .",
        "Nothing is marked here .",
        "They see him and it , him .",
    ]
    phrases = [[spelled(r, p)[0] for p in r["tokens_positive_eval"]] for r in records]
    assert phrases == [["An older man", "two people"], [], ["They", "him", "him"]]
    assert records[2]["tokens_positive_eval"] == [[[0, 4]], [[9, 12]], [[22, 25]]]
    first, second, third = (
        {tuple(a["bbox"]): spelled(r, a["tokens_positive"]) for a in r["annotations"]}
        for r in records
    )
    assert first == {
        (1, 2, 20, 30): ["An older man", "two people"],
        (30, 5, 20, 20): ["two people"],
    }
    assert second == {}
    assert third == {(1, 2, 20, 30): ["They", "him", "him"], (30, 5, 20, 20): ["They"]}
    assert {r["file_name"] for r in records} == {"images/36979.jpg"}
    assert [(r["original_img_id"], r["sentence_id"]) for r in records] == [
        (36979, number) for number in range(3)
    ]
    assert (records[0]["width"], records[0]["height"]) == (60, 40)
    image = json.loads((tmp_path / "final_flickr_separateGT_val.json").read_text())["images"][0]
    assert image["dataset_name"] == "flickr"
    assert image["tokens_negative"] == [[0, len(image["caption"])]]
    line = "1 images, 3 sentences, 5 phrases, 4 boxes; left out: 2 phrases without a box"
    assert line in capsys.readouterr().out


def test_merged_boxes_enclose(entities, tmp_path, read_grounding):
    assert script.main(arguments(entities, tmp_path, "--merged")) == 0
    records = read_grounding(tmp_path / "final_flickr_mergedGT_val.json")
    boxes = [sorted(a["bbox"] for a in record["annotations"]) for record in records]
    assert boxes[0] == [[1, 2, 20, 30], [1, 2, 49, 30]]


def test_same_as_the_generated_set_writes_itself(tmp_path, read_grounding):
    root = tmp_path / "shapes"
    prepare_shapes(root, num_train=6, num_val=4, image_size=96)
    splits = arguments(root / "flickr30k_entities", tmp_path, "train")  # --splits val train
    assert script.main(splits) == 0
    for split in ("train", "val"):
        name = f"final_flickr_separateGT_{split}.json"
        ours, theirs = (
            read_grounding(path) for path in (tmp_path / name, root / "annotations" / name)
        )
        assert [comparable(record) for record in ours] == [comparable(record) for record in theirs]


def comparable(record):
    plain = {key: value for key, value in record.items() if key not in ("annotations", "file_name")}
    boxes = {(*a["bbox"], str(sorted(a["tokens_positive"]))) for a in record["annotations"]}
    assert len(boxes) == len(record["annotations"])
    return {**plain, "name": record["file_name"].rsplit("/", 1)[-1], "boxes": boxes}


@pytest.mark.parametrize("protocol", ["separate", "merged"])
def test_the_evaluator_accepts_its_phrases(protocol, tmp_path, read_grounding):
    root = tmp_path / "shapes"
    prepare_shapes(root, num_train=1, num_val=4, image_size=96)
    merged = ["--merged"] if protocol == "merged" else []
    assert script.main(arguments(root / "flickr30k_entities", tmp_path, *merged)) == 0
    predictions = []
    for record in read_grounding(tmp_path / f"final_flickr_{protocol}GT_val.json"):
        corners = [
            (np.add(a["bbox"], [0, 0, *a["bbox"][:2]]).tolist(), a["tokens_positive"])
            for a in record["annotations"]
        ]
        boxes = [
            [box for box, spans in corners if phrase[0] in spans]
            for phrase in record["tokens_positive_eval"]
        ]
        ids = {"image_id": record["original_img_id"], "sentence_id": record["sentence_id"]}
        predictions.append({**ids, "boxes": boxes})
    images = read_entities(root / "flickr30k_entities", "val")
    recall = phrase_recall(images, predictions, topk=(1,), protocol=protocol)
    assert set(recall[1].values()) == {1.0}


WORD = st.text("abcdefgäß'-.,", min_size=1, max_size=6)
PART = st.tuples(st.lists(WORD, min_size=1, max_size=3), st.sampled_from([None, "12", "99"]))


@settings(max_examples=80, deadline=None)
@given(st.lists(PART, min_size=1, max_size=6), st.sampled_from([" ", "  "]), st.booleans())
def test_spans_spell_the_phrases(parts, space, loose):
    closing = f"{space}]" if loose else "]"
    marked = [
        space.join(words)
        if entity is None
        else f"[/EN#{entity}/people {space.join(words)}{closing}"
        for words, entity in parts
    ]
    line = space.join(marked)
    (phrases,) = parse_sentences(line)
    caption, spans = script.phrase_spans(script.words_of(line, phrases), phrases)
    assert caption == " ".join(" ".join(words) for words, _ in parts)
    expected = [" ".join(words) for words, entity in parts if entity is not None]
    assert [caption[begin:end] for begin, end in spans] == expected


def test_restarts(entities, tmp_path, restarts):
    output = tmp_path / "out" / "final_flickr_separateGT_val.json"
    restarts(script.main, arguments(entities, tmp_path / "out"), output)


def test_boxes_without_extent_are_left_out_but_not_their_phrase(entities, tmp_path, capsys, write):
    xml = XML.replace("<xmax>21<", "<xmax>1<")
    write(entities / "Annotations" / "36979.xml", xml)
    assert script.main(arguments(entities, tmp_path)) == 0
    assert (
        "5 phrases, 2 boxes; left out: 2 boxes without extent"
        in capsys.readouterr().out.replace("2 phrases without a box, ", "")
    )


@pytest.mark.slow
def test_as_a_program(entities, tmp_path, run_script):
    result = run_script("flickr30k_entities.py", *arguments(entities, tmp_path))
    assert result.returncode == 0 and "3 sentences, 5 phrases" in result.stdout
    (entities / "val.txt").unlink()
    result = run_script("flickr30k_entities.py", *arguments(entities, tmp_path, "--overwrite"))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "val.txt does not exist" in last


def test_bad_sources(entities, tmp_path, fails, write):
    output = tmp_path / "final_flickr_separateGT_val.json"

    def check(*words):
        fails(script.main, arguments(entities, tmp_path), *words, output=output)

    xml, text = entities / "Annotations" / "36979.xml", entities / "Sentences" / "36979.txt"
    write(xml, XML[:200])
    check("36979.xml is damaged")
    write(xml, XML.replace("<width>60</width>", ""))
    check("36979.xml does not give the size")
    write(xml, XML.replace("<xmax>21</xmax>", ""))
    check("36979.xml", "lacks one of xmin")
    write(xml, XML.replace("<xmax>21</xmax>", "<xmax>wide</xmax>"))
    check("36979.xml", "wide")
    write(xml, XML)
    write(text, "[people An older man] walks .")
    check("36979.txt", "without an entity id")
    write(text, "[/EN#12/people ] walks .")
    check("36979.txt", "has no words")
    text.unlink()
    check("36979.txt does not exist", "Sentences")
    write(entities / "val.txt", "../36979")
    check("'../36979' is no id")
    write(entities / "val.txt", "")
    check("val.txt names no image")
    (entities / "val.txt").unlink()
    check("val.txt does not exist", "Annotations/*.xml")
