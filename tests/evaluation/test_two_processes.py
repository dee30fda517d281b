"""Two processes with an overlapping share of the images score what one process scores."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from fiber_d2.engine.launch import launch
from fiber_d2.evaluation import FlickrRecallEvaluator, GroundedCOCOEvaluator, RefExpEvaluator

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data_eval"


def _evaluators(json_file):
    MetadataCatalog.get("two_processes").set(json_file=json_file)
    return DatasetEvaluators(
        [RefExpEvaluator(json_file=json_file), GroundedCOCOEvaluator("two_processes")]
    )


def _run(evaluators, records):
    evaluators.reset()
    for record in records:
        instances = Instances((10, 10))
        instances.pred_boxes = Boxes(torch.tensor(record["boxes"]).reshape(-1, 4))
        instances.scores = torch.tensor(record["scores"])
        instances.pred_classes = torch.full((len(record["scores"]),), record["category_id"])
        evaluators.process([{"image_id": record["image_id"]}], [{"instances": instances}])
    return evaluators.evaluate()


def _run_phrases(folder, records):
    """The saved predictions of sentences, given to an evaluator as a model would."""
    evaluator = FlickrRecallEvaluator(entities_root=folder, split="val", protocol="both")
    evaluator.reset()
    for record in records:
        counts = [len(boxes) for boxes in record["boxes"]]
        instances = Instances((10, 10))
        flat = [box for boxes in record["boxes"] for box in boxes]
        instances.pred_boxes = Boxes(torch.tensor(flat).reshape(-1, 4))
        # Of every phrase the boxes come best first.
        instances.scores = -torch.cat([torch.arange(count) for count in counts]).float()
        phrases = torch.arange(len(counts))
        instances.pred_classes = phrases.repeat_interleave(torch.tensor(counts))
        item = {
            "original_img_id": record["image_id"],
            "sentence_id": record["sentence_id"],
            "prompt": [SimpleNamespace(num_targets=len(counts))],
        }
        evaluator.process([item], [{"instances": instances}])
    return evaluator.evaluate()


def _share(rank, records):
    # Three records are given to both processes, as a sampler with padding would.
    half = len(records) // 2
    return records[: half + 3] if rank == 0 else records[half:]


def _work(folder, records, sentences):
    rank = comm.get_rank()
    results = _run(_evaluators(f"{folder}/gt.json"), _share(rank, records))
    results.update(_run_phrases(folder, _share(rank, sentences)))
    Path(folder, f"results_{rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_two_processes_score_what_one_scores(tmp_path):
    fixture = json.loads((FIXTURES / "b_refexp.json").read_text())
    ground_truth = fixture["gt"]
    classes = sorted({a["category_id"] for a in ground_truth["annotations"]})
    ground_truth["categories"] = [{"id": c, "name": f"class {c}"} for c in classes]
    (tmp_path / "gt.json").write_text(json.dumps(ground_truth))
    right = {a["image_id"]: a["category_id"] for a in ground_truth["annotations"]}
    records = [{**r, "category_id": right[r["image_id"]]} for r in fixture["predictions"]]

    phrases = json.loads((FIXTURES / "a_flickr.json").read_text())
    for folder in ("Annotations", "Sentences"):
        (tmp_path / folder).mkdir()
    for image in phrases["images"]:
        name = image["image_id"]
        (tmp_path / "Annotations" / f"{name}.xml").write_text(image["xml"])
        (tmp_path / "Sentences" / f"{name}.txt").write_text(image["sentences"])
    names = [image["image_id"] for image in phrases["images"]]
    (tmp_path / "val.txt").write_text("\n".join(names))
    sentences = [r for r in phrases["predictions"] if r["boxes"]]

    launch(_work, num_processes=2, args=(str(tmp_path), records, sentences))
    main, other = (json.loads((tmp_path / f"results_{r}.json").read_text()) for r in range(2))
    alone = _run(_evaluators(str(tmp_path / "gt.json")), records)
    alone.update(_run_phrases(tmp_path, sentences))
    assert set(alone) == {"refexp", "bbox", "grounding"}
    assert other == {}
    for task, results in alone.items():
        assert main[task] == pytest.approx(results, nan_ok=True)
