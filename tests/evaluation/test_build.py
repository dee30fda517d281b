import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

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
    with pytest.raises(ValueError, match="evaluator_type 'lvis'.*coco, flickr, refexp"):
        build_evaluator(register("lvis"))
    with pytest.raises(KeyError, match="'nowhere' is not registered"):
        build_evaluator("nowhere")
