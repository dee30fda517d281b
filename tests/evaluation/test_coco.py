import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from fiber_d2.evaluation import GroundedCOCOEvaluator

CATEGORIES = [
    {"id": 40, "name": "zebra"},
    {"id": 7, "name": "ant"},
    {"id": 23, "name": "yak"},
    {"id": 90, "name": "unicorn"},  # no image shows one
]
# The data set's own order of classes: neither by id nor by name.
CONTIGUOUS = {40: 0, 7: 1, 23: 2, 90: 3}


@pytest.fixture
def register(tmp_path):
    names = []

    def _register(content, **metadata):
        path = tmp_path / f"gt_{len(names)}.json"
        path.write_text(json.dumps(content))
        name = f"coco_eval_test_{len(names)}"
        names.append(name)
        DatasetCatalog.register(name, list)
        classes = [c["name"] for c in content["categories"]]
        MetadataCatalog.get(name).set(
            json_file=str(path),
            evaluator_type="coco",
            **{
                "thing_classes": classes,
                "thing_dataset_id_to_contiguous_id": CONTIGUOUS,
                **metadata,
            },
        )
        return name

    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _ground_truth(seed=0, images=12):
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(images - 1):  # the last image is empty
        for _ in range(rng.integers(1, 6)):
            x, y = rng.uniform(0, 150, 2)
            w, h = rng.uniform(5, 120, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + image,
                    "category_id": int(rng.choice([40, 7, 23])),
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    return {
        "images": [{"id": 100 + i, "width": 300, "height": 300} for i in range(images)],
        "categories": CATEGORIES,
        "annotations": annotations,
    }


def _outputs(content, seed=1):
    """Noisy copies of the ground truth and some false boxes, per image."""
    rng = np.random.default_rng(seed)
    pairs = []
    for image in content["images"]:
        boxes, classes = [], []
        for annotation in content["annotations"]:
            if annotation["image_id"] != image["id"]:
                continue
            for _ in range(2):
                x, y, w, h = np.asarray(annotation["bbox"]) + rng.normal(0, 6, 4)
                boxes.append([x, y, x + max(w, 1), y + max(h, 1)])
                right = rng.random() < 0.8
                classes.append(CONTIGUOUS[annotation["category_id"]] if right else 1)
        pairs.append(({"image_id": image["id"]}, _output(boxes, rng.random(len(boxes)), classes)))
    return pairs


def _output(boxes, scores, classes):
    instances = Instances((300, 300))
    instances.pred_boxes = Boxes(torch.as_tensor(np.asarray(boxes, np.float32)).reshape(-1, 4))
    instances.scores = torch.as_tensor(np.asarray(scores, np.float32))
    instances.pred_classes = torch.as_tensor(np.asarray(classes, np.int64))
    return {"instances": instances}


def _perfect(content):
    pairs = []
    for image in content["images"]:
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        classes = [CONTIGUOUS[a["category_id"]] for a in mine]
        pairs.append(({"image_id": image["id"]}, _output(boxes, np.ones(len(mine)), classes)))
    return pairs


def _evaluate(evaluator, pairs):
    evaluator.reset()
    for item, output in pairs:
        evaluator.process([item], [output])
    return evaluator.evaluate()


def test_both_scorers_and_detectron2_give_the_same_numbers(register, tmp_path):
    pytest.importorskip("faster_coco_eval")
    content = _ground_truth()
    name = register(content)
    pairs = _outputs(content)
    slow = _evaluate(GroundedCOCOEvaluator(name, use_faster=False), pairs)["bbox"]
    fast = _evaluate(GroundedCOCOEvaluator(name, use_faster=True), pairs)["bbox"]
    assert list(slow) == list(fast)
    np.testing.assert_allclose(list(slow.values()), list(fast.values()), atol=1e-9)
    assert 10 < slow["AP"] < 90

    # Detectron2 pairs class names with ascending json ids, so leave out its per-class figures.
    reference = _evaluate(
        COCOEvaluator(name, tasks=("bbox",), use_fast_impl=False, distributed=False), pairs
    )["bbox"]
    for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        np.testing.assert_allclose(slow[metric], reference[metric], atol=1e-9)


def test_per_class_table_goes_by_name_and_leaves_absent_classes_out(register):
    content = _ground_truth()
    name = register(content)
    pairs = _perfect(content)
    for _, output in pairs:  # every yak is taken for a unicorn
        classes = output["instances"].pred_classes
        classes[classes == CONTIGUOUS[23]] = CONTIGUOUS[90]
    results = _evaluate(GroundedCOCOEvaluator(name), pairs)["bbox"]
    per_class = {key: value for key, value in results.items() if key.startswith("AP-")}
    assert per_class == pytest.approx({"AP-zebra": 100, "AP-ant": 100, "AP-yak": 0})
    assert results["AP"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("faster", [False, True])
def test_no_prediction_is_ap_zero_with_a_warning(register, caplog, faster):
    if faster:
        pytest.importorskip("faster_coco_eval")
    content = _ground_truth()
    evaluator = GroundedCOCOEvaluator(register(content), use_faster=faster)
    empty = [({"image_id": i["id"]}, _output([], [], [])) for i in content["images"]]
    for pairs in (empty, []):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            results = _evaluate(evaluator, pairs)["bbox"]
        assert results["AP"] == results["AP50"] == results["AP-ant"] == 0
        assert "Not a single box was predicted" in caplog.text


def test_images_without_predictions_lower_recall_only(register):
    content = _ground_truth()
    evaluator = GroundedCOCOEvaluator(register(content))
    pairs = _perfect(content)
    assert _evaluate(evaluator, pairs)["bbox"]["AP"] == pytest.approx(100)
    some = _evaluate(evaluator, pairs[: len(pairs) // 2])["bbox"]["AP"]
    assert 0 < some < 100


def test_repeated_images_count_once(register):
    content = _ground_truth()
    evaluator = GroundedCOCOEvaluator(register(content))
    pairs = _outputs(content)
    once = _evaluate(evaluator, pairs)["bbox"]
    again = _evaluate(evaluator, pairs + pairs[:4])["bbox"]
    assert once == pytest.approx(again, nan_ok=True)


def test_legacy_boxes_have_inclusive_corners(register, tmp_path):
    name = register(_ground_truth())
    boxes = [[10.0, 20.0, 29.0, 49.0]]
    for legacy, expected in ((True, [10, 20, 20, 30]), (False, [10, 20, 19, 29])):
        evaluator = GroundedCOCOEvaluator(
            name, legacy_boxes=legacy, output_dir=tmp_path / str(legacy)
        )
        output = _output(boxes, [0.5], [1])
        _evaluate(evaluator, [({"image_id": 100}, output)])
        saved = json.loads((tmp_path / str(legacy) / "coco_instances_results.json").read_text())
        assert saved == [{"image_id": 100, "category_id": 7, "bbox": expected, "score": 0.5}]
        # What the model returned is not changed under the caller's hands.
        assert output["instances"].pred_boxes.tensor.tolist() == boxes


def test_classes_beyond_the_json_are_dropped(register):
    content = _ground_truth()
    evaluator = GroundedCOCOEvaluator(register(content))
    pairs = _perfect(content)
    pairs[-1][1]["instances"] = _output([[0, 0, 50, 50]], [1.0], [17])["instances"]
    assert _evaluate(evaluator, pairs)["bbox"]["AP"] == pytest.approx(100)


def test_hand_made_json_without_area_and_crowd(register):
    content = _ground_truth()
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
    full = register(content)
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    bare = register(content)
    pairs = _outputs(content)
    for faster in (False, True):
        if faster:
            pytest.importorskip("faster_coco_eval")
        expected = _evaluate(GroundedCOCOEvaluator(full, use_faster=faster), pairs)["bbox"]
        found = _evaluate(GroundedCOCOEvaluator(bare, use_faster=faster), pairs)["bbox"]
        assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("faster", [False, True])
def test_ids_of_annotations_may_begin_at_zero(register, faster):
    """pycocotools by itself counts a match with the box of id 0 as a false positive."""
    if faster:
        pytest.importorskip("faster_coco_eval")
    content = _ground_truth()
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    evaluator = GroundedCOCOEvaluator(register(content), use_faster=faster)
    assert _evaluate(evaluator, _perfect(content))["bbox"]["AP"] == pytest.approx(100)


def test_more_boxes_than_the_limit_do_not_count(register):
    content = _ground_truth(images=2)
    name = register(content)
    ((item, output), empty) = _perfect(content)
    wrong = Instances((300, 300))
    wrong.pred_boxes = Boxes(torch.tensor([[200.0, 200.0, 201.0, 201.0]]).repeat(3, 1))
    wrong.scores = torch.full((3,), 2.0)
    wrong.pred_classes = torch.as_tensor([0, 1, 2])
    both = Instances.cat([wrong, output["instances"]])
    for limit, lower, upper in ((1, 0, 0), (100, 1, 100)):
        evaluator = GroundedCOCOEvaluator(name, max_dets_per_image=limit)
        ap = _evaluate(evaluator, [(item, {"instances": both}), empty])["bbox"]["AP"]
        assert lower <= ap <= upper


def test_images_outside_of_the_json_and_missing_files(register):
    content = _ground_truth()
    name = register(content)
    evaluator = GroundedCOCOEvaluator(name)
    with pytest.raises(ValueError, match="image_id 5"):
        _evaluate(evaluator, [({"image_id": 5}, _output([[0, 0, 1, 1]], [1], [0]))])
    MetadataCatalog.get("coco_eval_missing").set(json_file="/nowhere/instances.json")
    with pytest.raises(FileNotFoundError, match="instances.json is missing.*coco_eval_missing"):
        GroundedCOCOEvaluator("coco_eval_missing")


def test_a_json_without_annotations_saves_but_does_not_score(register, tmp_path):
    content = _ground_truth()
    pairs = _outputs(content)
    del content["annotations"]
    evaluator = GroundedCOCOEvaluator(register(content), output_dir=tmp_path / "out")
    assert _evaluate(evaluator, pairs) == {}
    saved = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert len(saved) == sum(len(output["instances"]) for _, output in pairs)
