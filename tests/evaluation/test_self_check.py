import json
import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from fiber_d2.data import register_all_builtin, register_coco_json
from fiber_d2.data.records import load_records
from fiber_d2.data.shapes import prepare_shapes
from fiber_d2.evaluation import (
    DescriptionEvaluator,
    GeneralizedRefExpEvaluator,
    GroundedCOCOEvaluator,
    build_evaluator,
)
from fiber_d2.evaluation.perfect import spread
from fiber_d2.evaluation.self_check import check_prompts, self_check
from fiber_d2.structures import Prompt


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    prepare_shapes(root / "shapes", num_train=1, num_val=6, image_size=64)
    register_all_builtin(str(root))
    yield root / "shapes" / "annotations"
    register_all_builtin()


@pytest.fixture
def custom(tmp_path):
    """Register a COCO json of one's own: ``custom(content) -> name``."""
    names = []

    def register(content):
        path = tmp_path / f"{len(names)}.json"
        path.write_text(json.dumps(content))
        names.append(f"self_check_{tmp_path.name}_{len(names)}")
        register_coco_json(names[-1], str(path), str(tmp_path))
        load_records(names[-1])
        return names[-1]

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def content(annotations, categories=("cat", "dog"), images=3):
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in range(images)
        ],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(categories)],
        "annotations": [
            {"id": i, "iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a}
            for i, a in enumerate(annotations, start=1)
        ],
    }


def box(image_id, category_id, bbox, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def prompt(num_tokens=8, rows=2, target_ids=None, empty=()):
    positive_map = torch.zeros(rows, num_tokens)
    for row in range(rows):
        positive_map[row, row + 1] = float(row not in empty)
    return Prompt(
        text="a prompt",
        input_ids=torch.arange(num_tokens),
        attention_mask=torch.ones(num_tokens, dtype=torch.bool),
        positive_map=positive_map,
        target_ids=torch.arange(rows) if target_ids is None else torch.tensor(target_ids),
    )


@pytest.mark.parametrize("kind", ["detection", "grounding", "refexp", "lvis"])
def test_generated_data_pass(shapes, kind, caplog):
    name = f"shapes_{kind}_val"
    load_records(name)
    evaluator = build_evaluator(name, "nowhere")
    items = [{"image_id": 1, "prompt": prompt(rows=12, num_tokens=20)}]
    with caplog.at_level(logging.INFO, logger="fiber_d2"):
        done = self_check(name, evaluator, dataset=items, max_tokens=20)
    assert "reach tokens in 1 images, at most 20 of 20" in done[0]
    assert "100.0" in "; ".join(done)
    assert f"Self-check of {name} passed" in caplog.text


def test_large_sets_are_checked_in_part(shapes):
    assert list(spread(3, 5)) == [0, 1, 2]
    assert spread(100, 5) == [0, 20, 40, 60, 80]
    name = "shapes_detection_val"
    done = self_check(name, build_evaluator(name), max_images=2)
    assert any("ground truth of 2 images" in text for text in done)


def test_prompts():
    good = [{"image_id": 5, "prompt": [prompt(), prompt(rows=1, target_ids=[2])]}]
    assert "all 3 classes" in check_prompts(good, max_tokens=8, class_names=["a", "b", "c"])[0]
    assert "all phrases" in check_prompts(good)[0]
    with pytest.raises(ValueError, match="image 5 has 8 tokens, more than the limit of 7"):
        check_prompts(good, max_tokens=7)
    with pytest.raises(ValueError, match="each of 4 classes once, but does not for d"):
        check_prompts(good, class_names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="each of 2 classes once, but does not for 2"):
        check_prompts(good, class_names=["a", "b"])
    twice = [{"image_id": 5, "prompt": [prompt(), prompt(rows=1, target_ids=[1])]}]
    with pytest.raises(ValueError, match="each of 2 classes once, but does not for b"):
        check_prompts(twice, class_names=["a", "b"])
    mute = [{"image_id": 5, "prompt": prompt(empty=[1])}]
    with pytest.raises(ValueError, match="image 5 has no token for b"):
        check_prompts(mute, class_names=["a", "b"])
    with pytest.raises(ValueError, match="image 5 has no token for 1"):
        check_prompts(mute)


def test_crowds_flat_boxes_and_overfull_images_are_no_mistake(custom, caplog):
    annotations = [
        box(0, 10, [1, 2, 30, 40]),
        box(0, 10, [1, 2, 30, 40]),  # drawn twice
        box(0, 10, [0, 0, 90, 90], iscrowd=1),
        box(1, 11, [5, 5, 0, 20]),  # no area
        *(box(2, 11, [i, i, 10, 10]) for i in range(8)),
        box(1, 11, [20.5, 30.25, 0.75, 60]),
    ]
    name = custom(content(annotations))
    evaluator = GroundedCOCOEvaluator(name, max_dets_per_image=5, legacy_boxes=True)
    done = "; ".join(self_check(name, evaluator))
    assert "AP 100.0" in done
    assert "1 boxes without area" in done
    assert "1 classes of images with more boxes than count" in done
    # The evaluator is as it was.
    assert evaluator._predictions == [] and evaluator._legacy_boxes
    assert len(evaluator.ground_truth) == len(annotations)


def test_json_without_annotations_of_the_chosen_images(custom):
    name = custom(content([box(2, 10, [0, 0, 5, 5])]))
    done = self_check(name, GroundedCOCOEvaluator(name), max_images=1)
    assert "no annotations among the chosen images" in done
    name = custom(content([]))
    assert "no annotations to score" in self_check(name, GroundedCOCOEvaluator(name))


def test_categories_that_no_class_stands_for(custom):
    wrong = content([box(0, 10, [0, 0, 5, 5]), box(0, 11, [9, 9, 5, 5])])
    name = custom(wrong)
    evaluator = GroundedCOCOEvaluator(name)
    evaluator._json_ids = {0: 10}
    with pytest.raises(ValueError, match=f"self-check of '{name}' failed: .* are of dog, for"):
        self_check(name, evaluator)
    evaluator._json_ids = {10: 10, 11: 11}  # as if made before the data set was read
    with pytest.raises(ValueError, match="takes the category ids 10, 11 for other classes"):
        self_check(name, evaluator)


def test_boxes_that_the_evaluator_reads_otherwise(custom):
    name = custom(content([box(0, 10, [0, 0, 50, 50]), box(1, 11, [9, 9, 50, 50])]))

    class Shifted(GroundedCOCOEvaluator):
        def process(self, inputs, outputs):
            for output in outputs:
                output["instances"].pred_boxes.tensor[:, 0] += 20
            super().process(inputs, outputs)

    with pytest.raises(
        ValueError, match=r"less AP than 100.00: cat \(.*\), dog \(.*skip-self-check"
    ):
        self_check(name, Shifted(name))


def test_images_that_the_evaluator_does_not_know(custom):
    shown = custom(content([box(0, 10, [0, 0, 50, 50])], images=5))
    scored = custom(content([box(0, 10, [0, 0, 50, 50])], images=3))
    with pytest.raises(ValueError, match="the images 3, 4 are shown to the model"):
        self_check(shown, GroundedCOCOEvaluator(scored))


def test_sentences_and_phrases_that_are_missing(shapes):
    name = "shapes_grounding_val"
    path = shapes / "final_flickr_separateGT_val.json"
    before = path.read_text()
    changed = json.loads(before)
    gone = changed["images"].pop()
    changed["annotations"] = [a for a in changed["annotations"] if a["image_id"] != gone["id"]]
    try:
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"lacks the sentences .*_{gone['sentence_id']} of"):
            self_check(name, build_evaluator(name))
        changed = json.loads(before)
        changed["images"][0]["tokens_positive_eval"].append([[0, 2]])
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="tokens_positive_eval of the sentences"):
            self_check(name, build_evaluator(name))
    finally:
        path.write_text(before)


def test_expressions_that_are_not_asked(shapes):
    name = "shapes_refexp_val"
    evaluator = build_evaluator(name)
    path = shapes / "finetune_shapes_val.json"
    before = path.read_text()
    changed = json.loads(before)
    gone = changed["images"].pop()
    changed["annotations"] = [a for a in changed["annotations"] if a["image_id"] != gone["id"]]
    try:
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"the expressions {gone['id']} have ground truth"):
            self_check(name, evaluator)
    finally:
        path.write_text(before)


def test_evaluators_of_ones_own_are_not_scored(custom):
    class Mine:
        pass

    name = custom(content([]))
    assert self_check(name, Mine()) == ["ground truth not scored: unknown to Mine"]


def test_sentences_that_an_image_is_not_asked_about(custom):
    asked = content([box(0, 10, [0, 0, 5, 5]), box(0, 11, [9, 9, 5, 5]), box(1, 11, [1, 1, 9, 9])])
    asked["images"][0]["sentence_ids"] = [10]
    name = custom(asked)
    assert "AP 100.0" in "; ".join(self_check(name, DescriptionEvaluator(name)))


def test_expressions_with_any_number_of_targets(custom):
    boxes = [box(0, 10, [0, 0, 5, 5]), box(0, 10, [9, 9, 5, 5]), box(1, 10, [1, 1, 9, 0])]
    name = custom(content(boxes))
    evaluator = GeneralizedRefExpEvaluator(name)
    # The box without area cannot be found; the third expression has no target.
    assert self_check(name, evaluator) == ["3 expressions; ground truth scores 66.7"]
    evaluator._score_thresh = 1.5
    with pytest.raises(ValueError, match=r"less precision than 66.67: Pr@F1 \(33.33\)"):
        self_check(name, evaluator)
