import contextlib
import copy
import io
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fiber_d2.data import build_test_loader, register_coco_json
from fiber_d2.evaluation import DescriptionEvaluator, build_evaluator

SENTENCES = [
    {"id": 5, "name": "a dog that is led on a leash", "absence": False},
    {"id": 2, "name": "a dog without a leash", "absence": True},
    {"id": 9, "name": "a person on a horse", "absence": False},
    {"id": 7, "name": "a hat that is not blue", "absence": True},
    {"id": 4, "name": "a horse without a rider", "absence": True},  # no image shows one
]
GROUPS = [[5, 2], [9, 7, 4]]  # scenarios: images of the first are asked about dogs only


def _content(seed=0, images=16, outside=0):
    """Two scenarios; ``outside`` boxes are of sentences that their image is not asked about."""
    rng = np.random.default_rng(seed)
    content = {"categories": SENTENCES, "images": [], "annotations": []}

    def add(image_id, category_id):
        x, y, w, h = rng.uniform([0, 0, 10, 10], [150, 150, 120, 120])
        number = len(content["annotations"])
        content["annotations"].append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": int(category_id),
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
        )

    for image_id in range(images):
        group = GROUPS[image_id % 2]
        content["images"].append(
            {
                "id": image_id,
                "file_name": f"{image_id}.png",
                "width": 300,
                "height": 300,
                "sentence_ids": group,
            }
        )
        for _ in range(rng.integers(0, 5)):
            add(image_id, rng.choice(group[:2]))
    for image_id in range(outside):
        add(image_id, GROUPS[1 - image_id % 2][0])
    return content


def _detections(content, seed=1):
    """Noisy copies of the boxes, some under wrong sentences, asked about or not."""
    rng = np.random.default_rng(seed)
    found = []
    for annotation in content["annotations"]:
        for _ in range(2):
            box = (np.array(annotation["bbox"]) + rng.normal(0, 6, 4)).clip(1).tolist()
            right = rng.random() < 0.7
            category_id = annotation["category_id"] if right else int(rng.choice([5, 2, 9, 7, 4]))
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": category_id,
                    "bbox": box,
                    "score": float(rng.random()),
                }
            )
    return found


def _asked(content, detections):
    groups = {image["id"]: image["sentence_ids"] for image in content["images"]}
    return [d for d in detections if d["category_id"] in groups[d["image_id"]]]


def _perfect(content):
    keys = ("image_id", "category_id", "bbox")
    return [{**{k: a[k] for k in keys}, "score": 1.0} for a in content["annotations"]]


@pytest.fixture
def register(tmp_path):
    names = []

    def _register(content):
        name = f"description_test_{len(names)}"
        names.append(name)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        register_coco_json(name, str(path), str(tmp_path), evaluator_type="description")
        DatasetCatalog.get(name)  # reads the classes
        return name

    yield _register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _plain_scores(content, detections, categories, folder):
    """The published way: a file of these categories alone, scored by pycocotools."""
    ids = {category["id"] for category in categories}
    truth = [{**a, "id": a["id"] + 1} for a in content["annotations"] if a["category_id"] in ids]
    path = folder / "plain.json"
    path.write_text(json.dumps({**content, "categories": categories, "annotations": truth}))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        found = coco.loadRes([d for d in copy.deepcopy(detections) if d["category_id"] in ids])
        evaluation = COCOeval(coco, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[:3]


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("scenario", ["intra", "inter"])
@pytest.mark.parametrize("outside", [0, 4])
def test_results_equal_pycocotools_on_a_file_for_each_variant(
    register, tmp_path, scenario, outside, faster
):
    if faster:
        pytest.importorskip("faster_coco_eval")
    content = _content(outside=outside)
    detections = _detections(content)
    evaluator = DescriptionEvaluator(register(content), scenario=scenario, use_faster=faster)
    scores = evaluator.score(detections)
    results = scores["description"]
    counted = detections if scenario == "inter" else _asked(content, detections)
    assert len(_asked(content, detections)) < len(detections)
    for variant, absence in (("FULL", (True, False)), ("PRES", (False,)), ("ABS", (True,))):
        categories = [c for c in SENTENCES if c["absence"] in absence]
        expected = _plain_scores(content, counted, categories, tmp_path)
        names = (variant, f"{variant}/AP50", f"{variant}/AP75")
        np.testing.assert_allclose([results[name] for name in names], expected, atol=1e-9)
        assert 5 < results[variant] < 95
    sentences = {c["name"] for c in SENTENCES[:4]}
    assert {key[3:] for key in scores["bbox"] if key.startswith("AP-")} == sentences
    assert scores["bbox"]["AP"] == pytest.approx(results["FULL"])


def test_detections_of_other_sentences_count_between_scenarios_only(register):
    content = _content()
    name = register(content)
    perfect = _perfect(content)
    results = DescriptionEvaluator(name).score(perfect)["description"]
    assert (results["FULL"], results["PRES"], results["ABS"]) == pytest.approx((100, 100, 100))
    # Every box is claimed to be what the other scenario's first two sentences describe, too.
    other = {5: 9, 2: 7, 9: 5, 7: 2}
    claims = [{**d, "category_id": other[d["category_id"]], "score": 2.0} for d in perfect]
    assert DescriptionEvaluator(name).score(perfect + claims)["description"] == results
    inter = DescriptionEvaluator(name, scenario="inter")
    assert inter.score(perfect)["description"] == results
    assert inter.score(perfect + claims)["description"]["FULL"] < 60


def test_truth_of_other_sentences_is_missed_or_left_out(register, caplog):
    inside, content = _content(), _content(outside=4)
    detections = _detections(inside)
    name = register(content)
    perfect = _perfect(content)
    with caplog.at_level(logging.WARNING):
        strict = DescriptionEvaluator(name)
    assert "4 boxes of sentences" in caplog.text and "counted as missed" in caplog.text
    assert strict.score(perfect)["description"]["FULL"] < 100
    lenient = DescriptionEvaluator(name, count_unasked_boxes=False)
    assert lenient.score(perfect)["description"]["FULL"] == pytest.approx(100)
    expected = DescriptionEvaluator(register(inside)).score(detections)
    assert lenient.score(detections) == expected


def test_no_prediction_is_zero(register, caplog):
    evaluator = DescriptionEvaluator(register(_content()))
    with caplog.at_level(logging.WARNING):
        results = evaluator.score([])["description"]
    assert (results["FULL"], results["PRES"], results["ABS"]) == (0, 0, 0)
    assert "Not a single box" in caplog.text


def test_both_fields_are_optional(register):
    content = _content()
    expected = DescriptionEvaluator(register(content), scenario="inter").score(_detections(content))
    content["categories"] = [{"id": c["id"], "name": c["name"]} for c in SENTENCES]
    for image in content["images"]:
        del image["sentence_ids"]
    results = DescriptionEvaluator(register(content)).score(_detections(content))["description"]
    assert "PRES" not in results and "ABS" not in results
    assert results.items() <= expected["description"].items()


def test_faulty_fields_are_refused_by_name(register):
    changes = {
        "image 0 has the sentence_ids": lambda c: c["images"][0].update(sentence_ids=[5, 77]),
        "image 1 has the sentence_ids": lambda c: c["images"][1].update(sentence_ids=5),
        "category 2 has the absence": lambda c: c["categories"][1].update(absence="yes"),
    }
    for message, change in changes.items():
        content = copy.deepcopy(_content())
        change(content)
        with pytest.raises(ValueError, match=rf"description_test_\d\.json: the {message}"):
            DescriptionEvaluator(register(content))
    with pytest.raises(ValueError, match="scenario must be one of intra, inter"):
        DescriptionEvaluator(register(_content()), scenario="all")


def test_from_a_file_through_the_loader(register, tmp_path, caplog):
    """Each sentence is a prompt of its own; images that two processes report count once."""
    content = _content(images=4)
    for image in content["images"]:
        Image.new("RGB", (300, 300)).save(tmp_path / image["file_name"])
    name = register(content)
    evaluator = build_evaluator(name, output_dir=tmp_path / "out")
    assert type(evaluator) is DescriptionEvaluator
    loader = build_test_loader(
        dataset=name,
        tokenizer="shapes",
        augmentations=[T.NoOpTransform()],
        max_classes=1,
        num_workers=0,
    )
    contiguous = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    evaluator.reset()
    for batch in [*loader, *loader]:
        (item,) = batch
        assert [prompt.text for prompt in item["prompt"]] == [c["name"] for c in SENTENCES]
        assert [prompt.target_ids.tolist() for prompt in item["prompt"]] == [[i] for i in range(5)]
        mine = [a for a in content["annotations"] if a["image_id"] == item["image_id"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        instances = Instances((300, 300))
        instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.scores = torch.ones(len(mine))
        instances.pred_classes = torch.tensor(
            [contiguous[a["category_id"]] for a in mine], dtype=torch.int64
        )
        evaluator.process(batch, [{"instances": instances}])
    with caplog.at_level(logging.INFO):
        results = evaluator.evaluate()
    assert results["description"]["FULL"] == pytest.approx(100)
    assert "intra-scenario" in caplog.text and "PRES" in caplog.text
    saved = json.loads((tmp_path / "out" / name / "coco_instances_results.json").read_text())
    again = evaluator.score(saved)["description"]
    assert again == pytest.approx(results["description"], nan_ok=True)
