import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from fiber_d2.evaluation import FlickrRecallEvaluator, phrase_recall
from fiber_d2.evaluation.entities import (
    parse_boxes,
    parse_image,
    parse_sentences,
    read_entities,
)
from fiber_d2.evaluation.flickr import _as_saved
from fiber_d2.structures import Prompt

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data_eval"


@pytest.fixture(scope="module")
def fixture():
    return json.loads((FIXTURES / "a_flickr.json").read_text())


@pytest.fixture(scope="module")
def images(fixture):
    return {
        image["image_id"]: parse_image(image["xml"], image["sentences"])
        for image in fixture["images"]
    }


@pytest.fixture(scope="module")
def entities_root(fixture, tmp_path_factory):
    root = tmp_path_factory.mktemp("entities")
    (root / "Annotations").mkdir()
    (root / "Sentences").mkdir()
    for image in fixture["images"]:
        name = image["image_id"]
        (root / "Annotations" / f"{name}.xml").write_text(image["xml"])
        (root / "Sentences" / f"{name}.txt").write_text(image["sentences"])
    names = "\n".join(image["image_id"] for image in fixture["images"])
    (root / "test.txt").write_text(names + "\n")
    return root


def _prompt(num_targets):
    return Prompt(
        text="",
        input_ids=torch.zeros(3, dtype=torch.int64),
        attention_mask=torch.ones(3, dtype=torch.bool),
        positive_map=torch.zeros(num_targets, 3),
        target_ids=torch.arange(num_targets),
    )


def _instances(boxes, scores, classes):
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.as_tensor(scores, dtype=torch.float32)
    instances.pred_classes = torch.as_tensor(classes, dtype=torch.int64)
    return instances


def test_files_are_read_as_the_original_reads_them(fixture, images):
    assert set(fixture["parsed"]) == set(images)
    for name, expected in fixture["parsed"].items():
        image = images[name]
        assert {k: v.tolist() for k, v in image.boxes.items()} == expected["boxes"]
        assert {k: v.tolist() for k, v in image.merged().boxes.items()} == expected["merged"]
        found = [
            [
                {
                    "first_word_index": phrase.first_word,
                    "phrase": phrase.text,
                    "phrase_id": phrase.entity,
                    "phrase_type": list(phrase.types),
                }
                for phrase in image.evaluable(sentence)
            ]
            or None
            for sentence in range(len(image.sentences))
        ]
        assert found == expected["sentences"]
    evaluable = [
        f"{name}_{sentence}"
        for name, image in images.items()
        for sentence in range(len(image.sentences))
        if image.evaluable(sentence)
    ]
    assert sorted(evaluable) == sorted(fixture["evaluable_sentence_ids"])


@pytest.mark.parametrize(
    ("name", "protocol", "iou_thresh", "topk"),
    [
        ("separate", "separate", 0.5, (1, 5, 10, -1)),
        ("merged", "merged", 0.5, (1, 5, 10, -1)),
        ("separate_iou0.7_top1_3", "separate", 0.7, (1, 3, -1)),
        ("merged_iou0.7_top1_3", "merged", 0.7, (1, 3, -1)),
    ],
)
def test_recall_equals_the_original(fixture, images, name, protocol, iou_thresh, topk):
    found = phrase_recall(
        images, fixture["predictions"], topk=topk, iou_thresh=iou_thresh, protocol=protocol
    )
    assert {str(k): table for k, table in found.items()} == fixture["expected"][name]


def test_error_cases_of_the_original(fixture, images):
    assert {case["case"] for case in fixture["error_cases"]} == {
        "missing_sentence",
        "too_many_phrases",
    }
    for case in fixture["error_cases"]:
        key = (case["image_id"], case["sentence_id"])
        others = [r for r in fixture["predictions"] if (r["image_id"], r["sentence_id"]) != key]
        this = [r for r in fixture["predictions"] if (r["image_id"], r["sentence_id"]) == key]
        if case["case"] == "missing_sentence":
            records, message = others, f"{key[0]}_{key[1]}"
        else:
            longer = [{**r, "boxes": [*r["boxes"], [[0.0] * 4]]} for r in this]
            records, message = others + longer, "has 1 phrases with boxes"
        with pytest.raises(RuntimeError, match=message):
            phrase_recall(images, records)


def test_evaluator_reads_the_folder_and_reports_percent(fixture, entities_root):
    MetadataCatalog.get("flickr_fixture").set(entities_root=str(entities_root), split="test")
    evaluator = FlickrRecallEvaluator("flickr_fixture", protocol="both")
    results = evaluator.score(fixture["predictions"])["grounding"]
    for protocol, prefix in (("separate", ""), ("merged", "merged/")):
        for k, table in fixture["expected"][protocol].items():
            name = "upper_bound" if k == "-1" else f"R@{k}"
            for category, value in table.items():
                key = prefix + (name if category == "all" else f"{name}_{category}")
                assert results.pop(key) == pytest.approx(100 * value, abs=1e-9)
    assert not results


def test_model_outputs_are_grouped_as_the_original_groups_them(entities_root):
    evaluator = FlickrRecallEvaluator(entities_root=entities_root, split="test")
    evaluator.reset()
    cases = json.loads((FIXTURES / "f_merge_and_boxes.json").read_text())["flickr_grouping"]
    for case in cases:
        ratio = np.divide(case["original_size_wh"], case["network_size_wh"]).astype(np.float32)
        boxes = np.asarray(case["boxes"], np.float32).reshape(-1, 4) * np.tile(ratio, 2)
        output = _instances(boxes, case["scores"], np.asarray(case["labels"], np.int64) - 1)
        item = {
            "original_img_id": case["expected"]["image_id"],
            "sentence_id": case["expected"]["sentence_id"],
            "prompt": _prompt(case["n_phrases"]),
        }
        evaluator.process([item], [{"instances": output}])
    records = _as_saved(evaluator._records)
    assert len(records) == len(cases) > 0
    for record, case in zip(records, cases):
        expected = case["expected"]
        assert (record["image_id"], record["sentence_id"]) == (
            expected["image_id"],
            expected["sentence_id"],
        )
        assert len(record["boxes"]) == len(expected["boxes"]) == case["n_phrases"]
        for found, wanted in zip(record["boxes"], expected["boxes"]):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
            assert found[-1] == [0, 0, 0, 0]
        assert record["scores"] == expected["scores"]


def test_evaluation_from_model_outputs_and_again_after_reset(entities_root, fixture, tmp_path):
    """What process() collects scores the same as the records it was made from."""
    evaluator = FlickrRecallEvaluator(
        entities_root=entities_root, split="test", output_dir=tmp_path / "out"
    )
    for _ in range(2):
        evaluator.reset()
        for record in fixture["predictions"]:
            ranked = [
                (box, -rank, phrase)
                for phrase, boxes in enumerate(record["boxes"])
                for rank, box in enumerate(boxes[:-1])
            ]
            boxes, scores, classes = zip(*ranked) if ranked else ((), (), ())
            item = {
                "original_img_id": record["image_id"],
                "sentence_id": record["sentence_id"],
                "prompt": _prompt(len(record["boxes"])),
            }
            evaluator.process([item], [{"instances": _instances(boxes, scores, classes)}])
        results = evaluator.evaluate()["grounding"]
        expected = fixture["expected"]["separate"]
        assert results["R@1"] == pytest.approx(100 * expected["1"]["all"])
        assert results["R@10"] == pytest.approx(100 * expected["10"]["all"])
        assert results["upper_bound_people"] == pytest.approx(100 * expected["-1"]["people"])
        saved = json.loads((tmp_path / "out" / "flickr_predictions.json").read_text())
        assert evaluator.score(saved)["grounding"] == results


def test_repeats_do_not_change_the_score_and_are_reported(fixture, images, caplog):
    twice = fixture["predictions"] + fixture["predictions"][::-1]
    with caplog.at_level(logging.WARNING):
        assert phrase_recall(images, twice) == phrase_recall(images, fixture["predictions"])
    assert "repeated sentences" in caplog.text
    assert "without evaluable phrases" in caplog.text


def test_degenerate_ground_truth_is_a_miss(recwarn):
    xml = (
        "<annotation><object><name>1</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>0</xmax>"
        "<ymax>0</ymax></bndbox></object></annotation>"
    )
    image = parse_image(xml, "[/EN#1/other a dot] .")
    record = {"image_id": 7, "sentence_id": 0, "boxes": [[[0, 0, 0, 0]]]}
    recall = phrase_recall({"7": image}, [record], topk=(1, -1))
    assert recall == {1: {"all": 0.0, "other": 0.0}, -1: {"all": 0.0, "other": 0.0}}
    assert not [w for w in recwarn if "divide" in str(w.message)]


def test_several_names_and_missing_boxes_in_the_xml():
    xml = (
        "<annotation>"
        "<object><name>1</name><name>2</name><bndbox><xmin>1</xmin><ymin>2</ymin>"
        "<xmax>3</xmax><ymax>4</ymax></bndbox></object>"
        "<object><name>3</name><nobndbox>1</nobndbox></object>"
        "</annotation>"
    )
    boxes = parse_boxes(xml)
    assert {k: v.tolist() for k, v in boxes.items()} == {"1": [[1, 2, 3, 4]], "2": [[1, 2, 3, 4]]}


def test_sentence_markup():
    (phrases,) = parse_sentences(
        "Two [/EN#5/people/clothing young men] near [/EN#6/other it] .\n\n"
    )
    assert [(p.first_word, p.text, p.entity, p.types) for p in phrases] == [
        (1, "young men", "5", ("people", "clothing")),
        (4, "it", "6", ("other",)),
    ]


def test_missing_files_name_the_path_and_what_belongs_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"val\.txt is missing.*Annotations"):
        read_entities(tmp_path, "val")
    (tmp_path / "val.txt").write_text("12\n")
    with pytest.raises(FileNotFoundError, match=r"12\.xml"):
        read_entities(tmp_path, "val")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Sentences").mkdir()
    (tmp_path / "Annotations" / "12.xml").write_text("not xml")
    (tmp_path / "Sentences" / "12.txt").write_text("a dog")
    with pytest.raises(ValueError, match="image 12 .* not XML"):
        read_entities(tmp_path, "val")
    (tmp_path / "Annotations" / "12.xml").write_text("<annotation/>")
    with pytest.raises(ValueError, match="no sentence with a phrase that has boxes"):
        phrase_recall(read_entities(tmp_path, "val"), [])


def test_bad_arguments_are_refused(images, entities_root):
    with pytest.raises(ValueError, match="entities_root and split"):
        FlickrRecallEvaluator()
    with pytest.raises(ValueError, match="protocol"):
        FlickrRecallEvaluator(entities_root=entities_root, split="test", protocol="any")
    with pytest.raises(ValueError, match="topk"):
        phrase_recall(images, [], topk=(0,))
    evaluator = FlickrRecallEvaluator(entities_root=entities_root, split="test")
    output = [{"instances": _instances([[0, 0, 1, 1]], [0.5], [2])}]
    with pytest.raises(KeyError, match="sentence_id"):
        evaluator.process([{"original_img_id": 1, "prompt": _prompt(2)}], output)
    with pytest.raises(ValueError, match="the sentence has 2"):
        item = {"original_img_id": 1, "sentence_id": 0, "prompt": _prompt(2)}
        evaluator.process([item], output)
