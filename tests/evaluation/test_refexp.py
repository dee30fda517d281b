import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from fiber_d2.evaluation import RefExpEvaluator, expression_precision
from fiber_d2.evaluation.refexp import parse_expressions, ranked_predictions

FIXTURE = Path(__file__).parents[1] / "fixtures" / "data_eval" / "b_refexp.json"


@pytest.fixture(scope="module")
def fixture():
    return json.loads(FIXTURE.read_text())


@pytest.fixture(scope="module")
def expressions(fixture):
    return parse_expressions(fixture["gt"])


@pytest.fixture
def json_file(fixture, tmp_path):
    path = tmp_path / "finetune_test.json"
    path.write_text(json.dumps(fixture["gt"]))
    return path


@pytest.mark.parametrize(
    ("name", "iou_thresh", "generalized"),
    [
        ("giou_0_3", 0.3, True),
        ("giou_0_5", 0.5, True),
        ("giou_0_6", 0.6, True),
        ("plain_iou_0_5", 0.5, False),
    ],
)
def test_precision_equals_the_original(fixture, expressions, name, iou_thresh, generalized):
    found = expression_precision(
        expressions,
        fixture["predictions"],
        topk=fixture["topk"],
        iou_thresh=iou_thresh,
        generalized=generalized,
    )
    assert found == fixture["expected"][name]


def test_evaluator_from_model_outputs(fixture, json_file, tmp_path):
    MetadataCatalog.get("refexp_fixture").set(json_file=str(json_file))
    evaluator = RefExpEvaluator("refexp_fixture", output_dir=tmp_path / "out")
    for _ in range(2):  # a second evaluation starts afresh
        evaluator.reset()
        for record in fixture["predictions"]:
            instances = Instances((10, 10))
            instances.pred_boxes = Boxes(torch.tensor(record["boxes"]).reshape(-1, 4))
            instances.scores = torch.tensor(record["scores"])
            instances.pred_classes = torch.zeros(len(record["scores"]), dtype=torch.int64)
            evaluator.process([{"image_id": record["image_id"]}], [{"instances": instances}])
        results = evaluator.evaluate()["refexp"]
        counts = {}
        for image in fixture["gt"]["images"]:
            counts[image["dataset_name"]] = counts.get(image["dataset_name"], 0) + 1
        for expected, suffix in (("plain_iou_0_5", ""), ("giou_0_5", "_giou")):
            rates = fixture["expected"][expected]
            for place, k in enumerate((1, 5, 10)):
                for name in counts:
                    value = results[f"{name}/P@{k}{suffix}"]
                    assert value == pytest.approx(100 * rates[name][place])
                overall = sum(counts[n] * rates[n][place] for n in counts) / sum(counts.values())
                assert results[f"P@{k}{suffix}"] == pytest.approx(100 * overall)
        assert len(results) == 6 * (1 + len(counts))
    saved = json.loads((tmp_path / "out" / "refexp_predictions.json").read_text())
    assert evaluator.score(saved)["refexp"] == results


def test_equal_scores_put_the_larger_box_tuple_first(expressions):
    record = {
        "image_id": expressions.ids[0],
        "scores": [0.5, 0.9, 0.5, 0.5],
        "boxes": [[1, 9, 9, 9], [0, 0, 1, 1], [2, 3, 4, 5], [2, 3, 4, 6]],
    }
    ranked = ranked_predictions(expressions, [record])[0]
    assert ranked.tolist() == [[0, 0, 1, 1], [2, 3, 4, 6], [2, 3, 4, 5], [1, 9, 9, 9]]


def test_missing_and_empty_predictions_are_misses(fixture, expressions, caplog):
    perfect = [
        {"image_id": image_id, "boxes": [box], "scores": [1.0]}
        for image_id, box in zip(expressions.ids, expressions.boxes)
    ]
    name = str(expressions.datasets[0])
    total = int((expressions.datasets == name).sum())
    assert expression_precision(expressions, perfect)[name] == [1.0, 1.0, 1.0]
    empty = [{**perfect[0], "boxes": [], "scores": []}, *perfect[1:]]
    with caplog.at_level(logging.WARNING):
        assert expression_precision(expressions, empty)[name][0] == 1 - 1 / total
        assert not caplog.text
        assert expression_precision(expressions, perfect[1:])[name][0] == 1 - 1 / total
    assert f"1 of {len(expressions.ids)} expressions have no prediction" in caplog.text


def test_repeated_and_unknown_predictions_do_not_count(fixture, expressions, caplog):
    wrong = [{**r, "boxes": [[0, 0, 1, 1]], "scores": [1.0]} for r in fixture["predictions"]]
    stranger = [{"image_id": -1, "boxes": [[0, 0, 1, 1]], "scores": [1.0]}]
    with caplog.at_level(logging.WARNING):
        found = expression_precision(expressions, fixture["predictions"] + wrong + stranger)
    assert found == fixture["expected"]["plain_iou_0_5"]
    assert "1 unknown expressions" in caplog.text


def test_bad_files_are_refused_by_name(fixture, json_file, tmp_path):
    with pytest.raises(ValueError, match="needs json_file"):
        RefExpEvaluator()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json is missing"):
        RefExpEvaluator(json_file=tmp_path / "nowhere.json")
    changes = {
        "has more than one box": lambda gt: gt["annotations"].append(gt["annotations"][0]),
        "1 expressions have no box": lambda gt: gt["annotations"].pop(),
        "needs 'images' and 'annotations'": lambda gt: gt.pop("images"),
        "has no expression": lambda gt: gt.update(images=[], annotations=[]),
        "lacks 'bbox'": lambda gt: gt["annotations"][0].pop("bbox"),
    }
    for message, change in changes.items():
        content = copy.deepcopy(fixture["gt"])
        change(content)
        json_file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{json_file.name}: .*{message}"):
            RefExpEvaluator(json_file=json_file)
    json_file.write_text("no json")
    with pytest.raises(ValueError, match=json_file.name):
        RefExpEvaluator(json_file=json_file)
