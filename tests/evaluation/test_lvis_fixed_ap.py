import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from fiber_d2.data import load_lvis_json
from fiber_d2.evaluation import LVISFixedAPEvaluator, build_evaluator, lvis_fixed_ap, score_lvis

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data_eval"
TRUTH = FIXTURES / "c_lvis_gt.json"


@pytest.fixture
def register(tmp_path):
    names = []

    def _register(content=None, **metadata):
        path = tmp_path / f"truth_{len(names)}.json"
        path.write_text(TRUTH.read_text() if content is None else json.dumps(content))
        name = f"lvis_eval_test_{len(names)}"
        names.append(name)
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(json_file=str(path), evaluator_type="lvis", **metadata)
        return name

    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def truth():
    return json.loads(TRUTH.read_text())


@pytest.fixture(scope="module")
def expected():
    return json.loads((FIXTURES / "c_lvis_expected.json").read_text())["expected"]


@pytest.fixture(scope="module")
def pairs(truth):
    """Inputs and outputs, by image, of the fixture's detections."""
    classes = {category["id"]: index for index, category in enumerate(truth["categories"])}
    with np.load(FIXTURES / "c_lvis_detections.npz") as content:
        found = dict(content)
    labels = np.array([classes[category_id] for category_id in found["category_id"].tolist()])
    found_pairs = []
    for image in truth["images"]:
        rows = found["image_id"] == image["id"]
        output = instances(found["boxes_xyxy"][rows], found["scores"][rows], labels[rows])
        found_pairs.append(({"image_id": image["id"]}, output))
    return found_pairs


def instances(boxes, scores, classes):
    result = Instances((500, 500))
    result.pred_boxes = Boxes(torch.as_tensor(np.asarray(boxes, np.float32)).reshape(-1, 4))
    result.scores = torch.as_tensor(np.asarray(scores, np.float32))
    result.pred_classes = torch.as_tensor(np.asarray(classes, np.int64))
    return {"instances": result}


def evaluate(evaluator, pairs, batch=1):
    evaluator.reset()
    for start in range(0, len(pairs), batch):
        inputs, outputs = zip(*pairs[start : start + batch])
        evaluator.process(list(inputs), list(outputs))
    return evaluator.evaluate()


def assert_percent(found, table):
    shares = {key.split("@")[0]: value for key, value in table.items()}
    assert list(found) == list(shares)
    wanted = [np.nan if value == -1 else 100 * value for value in shares.values()]
    np.testing.assert_allclose(list(found.values()), wanted, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 4, 1000])
def test_both_kinds_of_ap_from_one_run(register, pairs, expected, batch):
    results = evaluate(LVISFixedAPEvaluator(register()), pairs, batch)
    assert list(results) == ["bbox", "bbox_per_image"]
    assert_percent(results["bbox"], expected["fixed_ap_topk10000"])
    assert_percent(results["bbox_per_image"], expected["normal_ap_per_image300"])


@pytest.mark.parametrize("topk", [25, 5])
def test_memory_is_bounded_and_the_result_the_same(register, pairs, expected, topk, monkeypatch):
    monkeypatch.setattr(lvis_fixed_ap, "_FIRST_TRIM", 100)
    evaluator = LVISFixedAPEvaluator(register(), topk_per_class=topk, max_dets_per_image=20)
    truth = evaluator.ground_truth
    limit = topk * len(truth.category_ids) + 20 * len(truth.image_ids)
    most = max(len(output["instances"]) for _, output in pairs)
    evaluator.reset()
    held = []
    for item, output in pairs:
        evaluator.process([item], [output])
        held.append(sum(len(part) for part in evaluator._parts))
    assert max(held) <= 2 * limit + most
    total = sum(len(output["instances"]) for _, output in pairs)
    assert held[-1] < total and any(after < before for before, after in zip(held, held[1:]))
    results = evaluator.evaluate()
    assert_percent(results["bbox"], expected[f"fixed_ap_topk{topk}"])
    assert_percent(results["bbox_per_image"], expected["lvis_package_maxdets20"])


def test_the_order_of_images_does_not_matter_even_at_equal_scores(register, pairs):
    rounded = []
    for item, output in pairs:
        found = output["instances"]
        scores = (found.scores * 8).round() / 8
        rounded.append(
            (item, instances(found.pred_boxes.tensor.numpy(), scores, found.pred_classes))
        )
    evaluator = LVISFixedAPEvaluator(register(), topk_per_class=20, max_dets_per_image=30)
    results = [evaluate(evaluator, some) for some in (rounded, rounded[::-1])]
    for kind in results[0]:
        assert list(results[0][kind].values()) == list(results[1][kind].values())


def test_images_that_come_again_count_once(register, pairs):
    evaluator = LVISFixedAPEvaluator(register())
    once = evaluate(evaluator, pairs)
    worse = [(item, instances([[0, 0, 9, 9]], [1.0], [0])) for item, _ in pairs[:5]]
    assert evaluate(evaluator, pairs + pairs[:7] + worse, batch=5) == once
    assert evaluate(evaluator, pairs) == once  # nothing is left over from the run before


def test_saved_predictions_score_the_same_without_the_evaluator(register, pairs, tmp_path):
    name = register()
    evaluator = LVISFixedAPEvaluator(
        name, output_dir=tmp_path / "out", topk_per_class=25, max_dets_per_image=20
    )
    results = evaluate(evaluator, pairs)
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "lvis_instances_results.json"
    limits = {"topk_per_class": 25, "max_dets_per_image": 20}
    json_file = MetadataCatalog.get(name).json_file
    for detections in (path, json.loads(path.read_text())):
        again = score_lvis(json_file, detections, **limits)
        for kind, metrics in results.items():
            assert {k: 100 * v for k, v in again[kind].items()} == dict(metrics)
    assert evaluator.score(path) == results


def test_the_saved_form(register, tmp_path, monkeypatch):
    monkeypatch.setattr("fiber_d2.evaluation.lvis_data._ROWS_AT_ONCE", 2)
    content = {
        "images": [
            {"id": i, "neg_category_ids": [], "not_exhaustive_category_ids": []} for i in (9, 4)
        ],
        "categories": [{"id": 30, "name": "b"}, {"id": 7, "name": "a"}],
        "annotations": [],
    }
    evaluator = LVISFixedAPEvaluator(register(content), output_dir=tmp_path / "out")
    output = instances(
        [[10, 20, 29.5, 50], [0, 0, 1, 1], [1, 2, 4, 8]], [0.5, 0.25, 0.125], [0, 5, 1]
    )
    boxes = output["instances"].pred_boxes.tensor.clone()
    evaluate(evaluator, [({"image_id": 9}, output), ({"image_id": 4}, output)])
    text = (tmp_path / "out" / "lvis_instances_results.json").read_text()
    # Classes in order of the file, as the reader numbers them; 5 is none of them.
    of_image = [
        {"category_id": 30, "bbox": [10.0, 20.0, 19.5, 30.0], "score": 0.5},
        {"category_id": 7, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.125},
    ]
    assert json.loads(text) == [{"image_id": i, **entry} for i in (4, 9) for entry in of_image]
    # What the model returned is not changed under the caller's hands.
    assert torch.equal(output["instances"].pred_boxes.tensor, boxes)


def test_classes_are_numbered_as_by_the_reader(register, truth, pairs):
    shuffled = {**truth, "categories": truth["categories"][::-1]}
    name = register(shuffled)
    load_lvis_json(MetadataCatalog.get(name).json_file, "", name)
    numbered = LVISFixedAPEvaluator(name)
    unread = LVISFixedAPEvaluator(register(shuffled))
    last = len(truth["categories"]) - 1
    turned = []
    for item, output in pairs:
        found = output["instances"]
        turned.append(
            (item, instances(found.pred_boxes.tensor, found.scores, last - found.pred_classes))
        )
    expected = evaluate(LVISFixedAPEvaluator(register()), pairs)
    assert evaluate(numbered, turned) == evaluate(unread, turned) == expected


def test_no_prediction_is_ap_zero_with_a_warning(register, truth, caplog):
    evaluator = LVISFixedAPEvaluator(register())
    empty = [({"image_id": image["id"]}, instances([], [], [])) for image in truth["images"]]
    for pairs in (empty, []):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            results = evaluate(evaluator, pairs)
        assert results["bbox"]["AP"] == results["bbox_per_image"]["AR"] == 0
        assert "Not a single box was predicted" in caplog.text


def test_the_log_tells_of_classes_with_few_detections(register, pairs, caplog):
    with caplog.at_level(logging.INFO):
        evaluate(LVISFixedAPEvaluator(register(), topk_per_class=5), pairs[:3])
    (text,) = [r.getMessage() for r in caplog.records if "fewer than" in r.getMessage()]
    counts = np.bincount(
        np.concatenate([output["instances"].pred_classes for _, output in pairs[:3]]), minlength=30
    )
    assert text.startswith(
        f"{(counts < 5).sum()} of 30 classes have fewer than the 5 detections that FixedAP counts, "
        f"{(counts == 0).sum()} of them none."
    )
    assert "FixedAP (5 per class)" in caplog.text and "AP (300 per image)" in caplog.text


def test_a_json_without_annotations_saves_but_does_not_score(register, truth, pairs, tmp_path):
    content = {
        "images": [{"id": image["id"]} for image in truth["images"]],
        "categories": truth["categories"],
    }
    evaluator = LVISFixedAPEvaluator(register(content), output_dir=tmp_path / "out")
    assert evaluate(evaluator, pairs) == {}
    saved = json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())
    assert len(saved) == sum(len(output["instances"]) for _, output in pairs)


def test_errors_name_what_is_wrong(register, truth):
    with pytest.raises(ValueError, match="image 'nowhere' is not in"):
        LVISFixedAPEvaluator(register()).process([{"image_id": "nowhere"}], [instances([], [], [])])
    with pytest.raises(ValueError, match="topk_per_class and max_dets_per_image must be positive"):
        LVISFixedAPEvaluator(register(), topk_per_class=0)
    coco = {**truth, "images": [{"id": image["id"]} for image in truth["images"]]}
    with pytest.raises(ValueError, match=r"truth_2\.json.* lacks neg_category_ids"):
        LVISFixedAPEvaluator(register(coco))
    MetadataCatalog.get("lvis_eval_missing").set(json_file="/nowhere/lvis.json")
    with pytest.raises(FileNotFoundError, match="lvis.json.*lvis_eval_missing"):
        LVISFixedAPEvaluator("lvis_eval_missing")
    with pytest.raises(ValueError, match="needs json_file in the metadata of 'lvis_eval_u"):
        LVISFixedAPEvaluator("lvis_eval_unknown")


def test_it_serves_lvis_data_sets(register, tmp_path):
    assert type(build_evaluator(register(), tmp_path)) is LVISFixedAPEvaluator
