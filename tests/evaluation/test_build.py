import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from fiber_d2.evaluation import GroundedCOCOEvaluator, RefExpEvaluator, build_evaluator


@pytest.fixture
def register(tmp_path):
    names = []

    def _register(kind):
        path = tmp_path / "gt.json"
        image = {"id": 1, "width": 9, "height": 9, "candidates": [[0, 0, 4, 4]]}
        annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4]}
        categories = [{"id": 1, "name": "thing"}]
        path.write_text(
            json.dumps({"images": [image], "annotations": [annotation], "categories": categories})
        )
        name = f"build_evaluator_test_{kind}"
        names.append(name)
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(evaluator_type=kind, json_file=str(path))
        return name

    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("kind", "cls"), [("coco", GroundedCOCOEvaluator), ("refexp", RefExpEvaluator)]
)
def test_the_metadata_choose_the_evaluator(register, kind, cls, tmp_path):
    name = register(kind)
    evaluator = build_evaluator(name, output_dir=tmp_path / "out")
    assert type(evaluator) is cls
    evaluator.reset()
    evaluator.evaluate()
    # Every data set has a folder of its own, so that several test sets do not overwrite another.
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / name]


def test_unknown_kinds_and_names_say_what_there_is(register):
    every = "coco, description, flickr, grefexp, lvis, refexp"
    with pytest.raises(ValueError, match=f"evaluator_type 'masks'.*{every}"):
        build_evaluator(register("masks"))
    with pytest.raises(KeyError, match="'nowhere' is not registered"):
        build_evaluator("nowhere")


def test_options_go_to_the_evaluator(register):
    name = register("coco")
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {1: 0}
    plain, legacy = (build_evaluator(name, legacy_boxes=legacy) for legacy in (False, True))
    prediction = Instances((9, 9))
    prediction.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 4.0, 4.0]]))
    prediction.scores, prediction.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    found = []
    for evaluator in (plain, legacy):
        evaluator.reset()
        evaluator.process([{"image_id": 1}], [{"instances": prediction}])
        found.append(evaluator.evaluate()["bbox"]["AP"])
    # The box of 4 x 4 pixels counts as 5 x 5, an IoU of 0.64.
    assert found == pytest.approx([100, 30])
    with pytest.raises(ValueError, match="no option 'legacy_box'; it has: legacy_boxes"):
        build_evaluator(name, legacy_box=True)
    with pytest.raises(ValueError, match="takes no such options"):
        build_evaluator(register("refexp"), topk="abc")
