import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from fiber_d2.data import register_all_builtin
from fiber_d2.data.shapes import prepare_shapes
from fiber_d2.evaluation import build_evaluator
from fiber_d2.evaluation.score import main, score_predictions

REPOSITORY = Path(__file__).parents[2]
FILES = {
    "detection": "coco_instances_results.json",
    "grounding": "flickr_predictions.json",
    "refexp": "refexp_predictions.json",
    "lvis": "lvis_instances_results.json",
}


class Phrases:
    """Stands for a prompt of so many targets."""

    def __init__(self, num_targets):
        self.num_targets = num_targets


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    prepare_shapes(root / "shapes", num_train=1, num_val=8, image_size=64)
    register_all_builtin(str(root))
    yield root
    register_all_builtin()


@pytest.fixture(scope="module")
def evaluated(root, tmp_path_factory):
    """Per kind of data set: the file of predictions, and the results of the evaluation."""
    folder = tmp_path_factory.mktemp("inference")
    rng = np.random.default_rng(0)
    found = {}
    for kind, file_name in FILES.items():
        name = f"shapes_{kind}_val"
        records = DatasetCatalog.get(name)
        evaluator = build_evaluator(name, folder)
        evaluator.reset()
        for record in records:
            targets = len(record.get("tokens_positive_eval", ())) if kind == "grounding" else 12
            boxes = np.asarray([a["bbox"] for a in record["annotations"]]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            boxes = np.repeat(boxes, 3, axis=0) + rng.normal(0, 2, (3 * len(boxes), 4))
            instances = Instances((64, 64))
            boxes = np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
            instances.pred_boxes = Boxes(torch.as_tensor(boxes))
            instances.scores = torch.as_tensor(rng.random(len(boxes)), dtype=torch.float32)
            classes = [a["category_id"] for a in record["annotations"]]
            if kind == "grounding":
                classes = rng.integers(0, max(targets, 1), len(classes)).tolist()
            instances.pred_classes = torch.as_tensor(classes, dtype=torch.int64).repeat_interleave(
                3
            )
            if kind == "grounding" and not targets:
                instances = instances[:0]
            item = {**record, "prompt": [Phrases(targets)] if kind == "grounding" else None}
            evaluator.process([item], [{"instances": instances}])
        found[kind] = (folder / name / file_name, evaluator.evaluate())
    return found


@pytest.mark.parametrize("kind", list(FILES))
def test_the_numbers_are_those_of_the_evaluation(evaluated, kind):
    path, expected = evaluated[kind]
    results, _ = score_predictions(str(path), f"shapes_{kind}_val")
    assert json.dumps(results) == json.dumps(expected)
    headline = next(iter(next(iter(results.values())).values()))
    assert 0 < headline < 100


def test_options_reach_the_evaluator(evaluated, tmp_path, capsys):
    path, expected = evaluated["grounding"]
    output = tmp_path / "out" / "results.json"
    code = main(
        [
            *("score", str(path), "--dataset", "shapes_grounding_val", "--output", str(output)),
            *("--iou", "0.9", "--option", "topk=[1, 3]", "--option", "protocol=both"),
        ]
    )
    assert code == 0
    assert "R@3" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert content["protocol"]["settings"]["iou_thresh"] == 0.9
    assert content["protocol"]["settings"]["topk"] == [1, 3]
    assert content["protocol"]["dataset"] == "shapes_grounding_val"
    assert content["results"]["grounding"]["R@1"] < expected["grounding"]["R@1"]
    assert "merged/R@3" in content["results"]["grounding"]


def test_mistakes_cost_one_line(evaluated, tmp_path, capsys):
    records = {kind: json.loads(path.read_text()) for kind, (path, _) in evaluated.items()}

    def error(kind, content, *more):
        path = tmp_path / "predictions.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        assert main(["score", str(path), "--dataset", f"shapes_{kind}_val", *more]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        return text

    first = records["detection"][0]
    assert "another data set" in error("detection", [{**first, "image_id": -5}])
    assert "image ids -5" in error("detection", [{**first, "image_id": -5}])
    assert "category ids 99" in error("detection", [{**first, "category_id": 99}])
    assert "Entry 0" in error("detection", records["refexp"])
    assert "unknown colour" in error("detection", [{**first, "colour": 1}])
    assert "is not JSON" in error("detection", "{")
    assert "list of predictions" in error("detection", {"a": 1})
    assert "Entry 0" in error("detection", [3])

    assert "sentences have no prediction" in error("grounding", records["grounding"][1:])
    foreign = [{**records["grounding"][0], "image_id": "elsewhere"}]
    assert "does not have the image ids elsewhere" in error("grounding", foreign)

    missing = records["refexp"].pop(3)["image_id"]
    assert f"lacks 1 of {len(records['refexp']) + 1} expressions: {missing}." in error(
        "refexp", records["refexp"]
    )
    assert "ids x" in error("refexp", [{**records["refexp"][0], "image_id": "x"}])

    detections = records["detection"]
    assert "no option 'iou'" in error("detection", detections, "--iou", "0.5").replace(
        "_thresh", ""
    )
    assert "KEY=VALUE" in error("detection", detections, "--option", "topk")
    assert "it has: legacy_boxes" in error("detection", detections, "--option", "x=1")
    for name in ("dataset_name", "output_dir", "distributed"):
        text = error("detection", detections, "--option", f"{name}=1")
        assert f"has no option '{name}' here" in text
    assert main(["score", "nowhere.json", "--dataset", "shapes_detection_val"]) == 2
    assert "nowhere.json does not exist" in capsys.readouterr().err
    assert main(["score", "nowhere.json", "--dataset", "shapes_detektion_val"]) == 2
    assert "Did you mean shapes_detection_val" in capsys.readouterr().err


def test_images_without_a_box_are_told(evaluated, tmp_path, caplog):
    path, _ = evaluated["detection"]
    records = json.loads(path.read_text())
    first = records[0]["image_id"]
    (tmp_path / "some.json").write_text(
        json.dumps([record for record in records if record["image_id"] != first])
    )
    score_predictions(str(tmp_path / "some.json"), "shapes_detection_val")
    assert f"has no box on 1 of 8 images: {first}" in caplog.text


def test_the_command_scores_a_json_of_ones_own_and_imports_data_sets(evaluated, root, tmp_path):
    path, expected = evaluated["detection"]
    truth = root / "shapes" / "annotations" / "instances_val.json"
    (tmp_path / "mine.py").write_text(
        "from fiber_d2.data import register_coco_json\n"
        f"register_coco_json('imported', {str(truth)!r}, 'images')\n"
    )
    for name, more in (
        ("custom", ["--json-file", str(truth), "--image-root", "images"]),
        ("imported", ["--import", str(tmp_path / "mine.py")]),
    ):
        output = tmp_path / f"{name}.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "fiber_d2.evaluation", "score", str(path)),
                *("--dataset", name, "--output", str(output), *more),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(output.read_text())["results"]["bbox"]
        assert found == pytest.approx(
            {k: v if np.isfinite(v) else None for k, v in expected["bbox"].items()}
        )
        assert "AP50" in done.stdout
