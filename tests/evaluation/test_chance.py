import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from fiber_d2.evaluation import chance_level


@pytest.fixture
def register():
    names = []

    def _register(**metadata):
        name = f"chance_test_{len(names)}"
        names.append(name)
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _row_of_boxes(count):
    return [[20.0 * i, 0.0, 10.0, 10.0] for i in range(count)]


def _expressions(per_image, images=400):
    return {
        "images": [
            {
                "id": i,
                "width": 200,
                "height": 20,
                "dataset_name": f"pick_{per_image}",
                "candidates": _row_of_boxes(per_image),
            }
            for i in range(images)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": _row_of_boxes(1)[0]}
            for i in range(images)
        ],
    }


def test_an_expression_is_guessed_right_once_in_as_many_tries_as_candidates(register, tmp_path):
    two, four = _expressions(2), _expressions(4)
    shift = len(two["images"])
    for entry in four["images"]:
        entry["id"] += shift
    for entry in four["annotations"]:
        entry["image_id"] += shift
    path = tmp_path / "refexp.json"
    path.write_text(json.dumps({key: two[key] + four[key] for key in two}))
    name = register(evaluator_type="refexp", json_file=str(path))
    found = chance_level(name, seed=3, repeats=10)["refexp"]
    # 4000 draws each: four standard deviations are 3.2 and 2.8 points.
    assert found["pick_2/P@1"] == pytest.approx(50, abs=3.2)
    assert found["pick_4/P@1"] == pytest.approx(25, abs=2.8)
    assert found["P@1"] == pytest.approx((found["pick_2/P@1"] + found["pick_4/P@1"]) / 2)
    assert found["P@5"] == 100
    assert found == chance_level(name, seed=3, repeats=10)["refexp"]
    assert found != chance_level(name, seed=4, repeats=10)["refexp"]


def test_expressions_without_candidates_have_no_chance_level(register, tmp_path):
    content = _expressions(2, images=3)
    del content["images"][1]["candidates"]
    path = tmp_path / "refexp.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"refexp\.json: expression 1 has no 'candidates'"):
        chance_level(register(evaluator_type="refexp", json_file=str(path)))


def test_a_phrase_is_guessed_among_all_boxes_of_its_image(register, tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Sentences").mkdir()
    entries = "".join(
        f"<object><name>{i}</name><bndbox><xmin>{x}</xmin><ymin>0</ymin><xmax>{x + 10}</xmax>"
        "<ymax>10</ymax></bndbox></object>"
        for i, x in enumerate(range(0, 100, 20), start=1)
    )
    sentence = "[/EN#1/people One] and [/EN#2/other two] and [/EN#9/scene nothing] .\n"
    names = [str(n) for n in range(50)]
    (tmp_path / "val.txt").write_text("\n".join(names))
    for name in names:
        (tmp_path / "Annotations" / f"{name}.xml").write_text(f"<annotation>{entries}</annotation>")
        (tmp_path / "Sentences" / f"{name}.txt").write_text(sentence * 4)
    name = register(evaluator_type="flickr", entities_root=str(tmp_path), split="val")
    found = chance_level(name, repeats=10)["grounding"]
    # Five boxes: 20 %; 4000 draws, four standard deviations are 2.6 points.
    assert found["R@1"] == pytest.approx(20, abs=2.6)
    assert found["R@5"] == found["upper_bound"] == found["upper_bound_people"] == 100
    assert "R@1_scene" not in found


def test_detection_by_random_classes(register, tmp_path):
    count = 8
    boxes = _row_of_boxes(10)
    rng = np.random.default_rng(0)
    content = {
        "images": [{"id": i, "width": 200, "height": 20} for i in range(40)],
        "categories": [{"id": 10 * c + 5, "name": f"class {c}"} for c in range(count)],
        "annotations": [
            {
                "id": 10 * i + j,
                "image_id": i,
                "category_id": int(10 * rng.integers(count) + 5),
                "bbox": box,
                "area": 100.0,
                "iscrowd": 0,
            }
            for i in range(40)
            for j, box in enumerate(boxes, start=1)
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    name = register(evaluator_type="coco", json_file=str(path))
    found = chance_level(name, repeats=3)["bbox"]
    # A class finds 1/8 of its boxes at precision 1/8, so AP is a little above 100 / 64.
    assert 100 / count**2 * 0.5 < found["AP50"] < 100 / count
    assert found["AP"] == pytest.approx(found["AP50"])  # boxes are perfect at any threshold
    assert found == pytest.approx(chance_level(name, repeats=3)["bbox"], nan_ok=True)


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="repeats"):
        chance_level("anything", repeats=0)
