"""Two processes with an overlapping share of the images: the LVIS result of one process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from fiber_d2.engine.launch import launch
from fiber_d2.evaluation import LVISFixedAPEvaluator

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data_eval"
LIMITS = {"topk_per_class": 25, "max_dets_per_image": 100}


def _run(output_dir, images):
    """Results of some images; their detections are the fixture's, with many equal scores."""
    truth = json.loads((FIXTURES / "c_lvis_gt.json").read_text())
    classes = {category["id"]: index for index, category in enumerate(truth["categories"])}
    MetadataCatalog.get("lvis_two_processes").set(json_file=str(FIXTURES / "c_lvis_gt.json"))
    evaluator = LVISFixedAPEvaluator("lvis_two_processes", output_dir=output_dir, **LIMITS)
    with np.load(FIXTURES / "c_lvis_detections.npz") as content:
        found = dict(content)
    evaluator.reset()
    for image_id in images:
        rows = found["image_id"] == image_id
        instances = Instances((500, 500))
        instances.pred_boxes = Boxes(torch.from_numpy(found["boxes_xyxy"][rows]))
        instances.scores = torch.from_numpy(found["scores"][rows]).bfloat16()
        labels = [classes[category_id] for category_id in found["category_id"][rows].tolist()]
        instances.pred_classes = torch.tensor(labels)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()


def _work(folder, shares):
    rank = comm.get_rank()
    results = _run(f"{folder}/two", shares[rank])
    Path(folder, f"results_{rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_two_processes_score_exactly_what_one_scores(tmp_path):
    truth = json.loads((FIXTURES / "c_lvis_gt.json").read_text())
    images = [image["id"] for image in truth["images"]]
    # Every other image each, and, as padding, the first five once more for the second process.
    shares = [images[::2], images[1::2] + images[:5]]
    launch(_work, num_processes=2, args=(str(tmp_path), shares))
    main, other = (json.loads((tmp_path / f"results_{r}.json").read_text()) for r in range(2))
    alone = _run(tmp_path / "one", images)
    assert other == {}
    assert main == json.loads(json.dumps(alone))
    assert 0 < alone["bbox"]["AP"] < alone["bbox_per_image"]["AP"]
    saved = [tmp_path / name / "lvis_instances_results.json" for name in ("two", "one")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
