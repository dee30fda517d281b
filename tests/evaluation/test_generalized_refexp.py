import copy
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import box_iou, generalized_box_iou

from fiber_d2.data import build_test_loader, load_grounding_json
from fiber_d2.evaluation import GeneralizedRefExpEvaluator, build_evaluator
from fiber_d2.evaluation.generalized_refexp import exactly_found, parse_generalized_expressions


def _content(seed=0, expressions=40):
    """Expressions of two data sets with 0 to 3 targets each."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in range(10, 10 + expressions):
        name = "first" if rng.random() < 0.7 else "second"
        images.append({"id": image_id, "dataset_name": name, "caption": "the left ones"})
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            x, y, w, h = rng.uniform([0, 0, 5, 5], [90, 90, 60, 60])
            annotations.append({"image_id": image_id, "bbox": [x, y, w, h], "category_id": 1})
    order = rng.permutation(len(annotations))
    return {"images": images, "annotations": [annotations[i] for i in order]}


def _targets(content, image_id):
    boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == image_id]
    return [[x, y, x + w, y + h] for x, y, w, h in boxes]


def _perfect(content):
    return [
        {"image_id": i["id"], "boxes": (b := _targets(content, i["id"])), "scores": [0.9] * len(b)}
        for i in content["images"]
    ]


def _noisy(content, seed=1):
    rng = np.random.default_rng(seed)
    records = []
    for record in _perfect(content):
        boxes = [np.add(box, rng.normal(0, 4, 4)) for box in record["boxes"]]
        boxes += [np.add(box, rng.normal(0, 9, 4)) for box in boxes if rng.random() < 0.2]
        if rng.random() < 0.2:
            boxes.append([5.0, 5.0, 40.0, 30.0])
        scores = rng.choice([0.9, 0.8, 0.75, 0.7, 0.4], len(boxes), p=[0.4, 0.3, 0.1, 0.1, 0.1])
        records.append(
            {
                "image_id": record["image_id"],
                "boxes": np.reshape(boxes, (-1, 4)).tolist(),
                "scores": scores.tolist(),
            }
        )
    return records


@pytest.fixture
def evaluator(tmp_path):
    def make(content, **options):
        path = tmp_path / "finetune_grefcoco_val.json"
        path.write_text(json.dumps(content))
        return GeneralizedRefExpEvaluator(json_file=path, **options)

    return make


def _plain_f1(boxes, targets, measure, iou_thresh):
    """The published definition, pair by pair: largest overlap first, each box and target once."""
    if not targets:
        return 1.0 if not boxes else 0.0
    overlap = measure(torch.tensor(boxes).reshape(-1, 4), torch.tensor(targets))
    pairs = sorted(
        (-float(overlap[b, t]), b, t) for b in range(len(boxes)) for t in range(len(targets))
    )
    used_boxes, used_targets = set(), set()
    for negative, b, t in pairs:
        if -negative >= iou_thresh and b not in used_boxes and t not in used_targets:
            used_boxes.add(b)
            used_targets.add(t)
    hits = len(used_boxes)
    return 2 * hits / (2 * hits + (len(boxes) - hits) + (len(targets) - hits))


@pytest.mark.parametrize("topk", [None, 1, 2])
@pytest.mark.parametrize("score_thresh", [0.7, 0.78])
def test_results_equal_the_plain_definition(evaluator, score_thresh, topk):
    content = _content()
    records = {r["image_id"]: r for r in _noisy(content)}
    results = evaluator(content, score_thresh=score_thresh, topk=topk).score(list(records.values()))
    for prefix, names in (("", ("first", "second")), ("first/", ("first",))):
        right = {"Pr@F1": [], "Pr@F1_giou": [], "N-acc": [], "T-acc": []}
        for image in content["images"]:
            if image["dataset_name"] not in names:
                continue
            record = records[image["id"]]
            ranked = sorted(zip(record["scores"], record["boxes"]), key=lambda pair: -pair[0])
            boxes = [box for score, box in ranked if score >= score_thresh][:topk]
            targets = _targets(content, image["id"])
            for name, measure in (("Pr@F1", box_iou), ("Pr@F1_giou", generalized_box_iou)):
                right[name].append(_plain_f1(boxes, targets, measure, 0.5) == 1)
            if targets:
                right["T-acc"].append(bool(boxes))
            else:
                right["N-acc"].append(not boxes)
        for name, values in right.items():
            assert results["grefexp"][prefix + name] == pytest.approx(100 * np.mean(values)), name
    assert 5 < results["grefexp"]["Pr@F1_giou"] <= results["grefexp"]["Pr@F1"] < 95


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pairs_are_taken_by_overlap(data):
    """Small integers make many equal and borderline overlaps."""
    side = st.integers(0, 4)
    box = st.tuples(side, side, side, side).map(
        lambda b: [float(b[0]), float(b[1]), float(b[0] + b[2] + 1), float(b[1] + b[3] + 1)]
    )
    cases = data.draw(
        st.lists(st.tuples(st.lists(box, max_size=4), st.lists(box, max_size=4)), max_size=6)
    )
    answers = [np.reshape(boxes, (-1, 4)) for boxes, _ in cases]
    targets = [np.reshape(boxes, (-1, 4)) for _, boxes in cases]
    found = exactly_found(answers, targets)
    assert found.tolist() == [_plain_f1(*case, box_iou, 0.5) == 1 for case in cases]


def test_greedy_pairs_and_duplicates():
    """As in the published code, the best pair is not given up for the sake of all pairs."""
    targets = np.array([[0.0, 0, 10, 1], [3, 0, 12, 1]])
    # Overlaps of 0.9 and 0.64 with the targets, and of 0.6 and 0.25.
    boxes = np.array([[1.0, 0, 10, 1], [0, 0, 6, 1]])
    assert exactly_found([boxes, targets[::-1]], [targets] * 2).tolist() == [False, True]
    apart = np.array([[0.0, 0, 10, 1], [20, 0, 30, 1]])
    answers = [apart, apart[[0, 0]], apart[[0, 0, 1]], apart[:1], apart[:0], None]
    expected = [True, False, False, False, False, False]
    assert exactly_found(answers, [apart] * len(answers)).tolist() == expected


def test_perfect_and_empty_predictions(evaluator):
    content = _content()
    perfect = evaluator(content).score(_perfect(content))["grefexp"]
    assert set(perfect.values()) == {100.0}
    assert list(perfect)[:5] == ["Pr@F1", "Pr@F1_giou", "N-acc", "T-acc", "first/Pr@F1"]
    empty = [{**r, "boxes": [], "scores": []} for r in _perfect(content)]
    results = evaluator(content).score(empty)["grefexp"]
    without = np.mean([not _targets(content, i["id"]) for i in content["images"]])
    assert 0 < without < 1
    assert results["Pr@F1"] == results["Pr@F1_giou"] == pytest.approx(100 * without)
    assert (results["N-acc"], results["T-acc"]) == (100, 0)


def test_an_expression_that_was_not_predicted_is_wrong(evaluator, caplog):
    content = _content()
    with caplog.at_level(logging.WARNING):
        results = evaluator(content).score([])["grefexp"]
    assert set(results.values()) == {0.0}
    assert "40 of 40 expressions have no prediction; each counts as wrong" in caplog.text


def test_repeated_and_unknown_predictions_do_not_count(evaluator, caplog):
    content = _content()
    found = evaluator(content).score(_noisy(content))
    wrong = [{**r, "boxes": [[0, 0, 1, 1]], "scores": [1.0]} for r in _noisy(content)]
    with caplog.at_level(logging.WARNING):
        again = evaluator(content).score(_noisy(content) + wrong + [{**wrong[0], "image_id": -1}])
    assert again == found
    assert "1 unknown expressions" in caplog.text


def test_the_published_mark_of_no_target(evaluator):
    content = _content()
    marked = copy.deepcopy(content)
    for number, image in enumerate(content["images"]):
        if not _targets(content, image["id"]):
            mark = {"empty": True} if number % 2 else {"category_id": -1}
            marked["annotations"].append({"image_id": image["id"], "bbox": [0, 0, 0, 0], **mark})
    expressions = parse_generalized_expressions(marked)
    plain = parse_generalized_expressions(content)
    assert expressions.ids == plain.ids
    for first, second in zip(expressions.targets, plain.targets):
        np.testing.assert_array_equal(first, second)
    records = _noisy(content)
    assert evaluator(marked).score(records) == evaluator(content).score(records)


def test_kinds_that_do_not_occur_have_no_score(evaluator):
    content = _content()
    content["images"] = [i for i in content["images"] if _targets(content, i["id"])]
    results = evaluator(content).score(_perfect(content))["grefexp"]
    assert np.isnan(results["N-acc"])
    assert results["Pr@F1"] == results["T-acc"] == 100


def _process(evaluator, records, **item):
    evaluator.reset()
    for record in records:
        instances = Instances((150, 150))
        instances.pred_boxes = Boxes(torch.tensor(record["boxes"]).reshape(-1, 4))
        instances.scores = torch.tensor(record["scores"])
        instances.pred_classes = torch.zeros(len(record["scores"]), dtype=torch.int64)
        evaluator.process([{"image_id": record["image_id"], **item}], [{"instances": instances}])


def test_saved_predictions_give_the_same_results(evaluator, tmp_path, caplog):
    content = _content()
    running = evaluator(content, output_dir=tmp_path / "out", score_thresh=0.78)
    for _ in range(2):  # a second evaluation starts afresh
        _process(running, _noisy(content))
        with caplog.at_level(logging.INFO):
            results = running.evaluate()
    path = tmp_path / "out" / "grefexp_predictions.json"
    saved = json.loads(path.read_text())
    assert len(saved) == len(content["images"])
    assert running.score(saved) == running.score_file(path) == results
    assert "Pr@F1_giou" in caplog.text and "second" in caplog.text
    path.write_text(json.dumps(saved[3:]))
    with pytest.raises(ValueError, match="lacks 3 of 40 expressions: 10, 11, 12"):
        running.score_file(path)
    path.write_text(json.dumps([*saved, {**saved[0], "image_id": 5}]))
    with pytest.raises(ValueError, match="another data set.*finetune_grefcoco_val.json"):
        running.score_file(path)
    path.write_text(json.dumps([{**saved[0], "bbox": []}]))
    with pytest.raises(ValueError, match="unknown bbox"):
        running.score_file(path)


def test_bad_files_and_arguments_are_refused_by_name(evaluator, tmp_path):
    with pytest.raises(ValueError, match="needs json_file"):
        GeneralizedRefExpEvaluator()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json is missing"):
        GeneralizedRefExpEvaluator(json_file=tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="topk"):
        evaluator(_content(), topk=0)
    with pytest.raises(ValueError, match="iou_thresh"):
        evaluator(_content(), iou_thresh=0)
    marked = {"image_id": _content()["annotations"][0]["image_id"], "empty": True}
    changes = {
        "needs 'images' and 'annotations'": lambda c: c.pop("annotations"),
        "has no expression": lambda c: c.update(images=[], annotations=[]),
        "need different ids": lambda c: c["images"].append(c["images"][0]),
        "which is not among the 'images'": lambda c: c["annotations"][0].update(image_id=-5),
        "but has a box as well": lambda c: c["annotations"].append(marked),
        "lacks 'bbox'": lambda c: c["annotations"][0].pop("bbox"),
    }
    for message, change in changes.items():
        content = _content()
        change(content)
        with pytest.raises(ValueError, match=f"finetune_grefcoco_val.json: .*{message}"):
            evaluator(content)
    with pytest.raises(ValueError, match="Expression 10 has 1 boxes but 2 scores"):
        evaluator(_content()).score(
            [{"image_id": 10, "boxes": [[0, 0, 1, 1]], "scores": [0.9, 0.9]}]
        )


def test_from_a_file_through_the_loader(tmp_path):
    """The documented json: expressions with two targets, with none, and with none as published."""
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    caption = "the two red circles"
    image = {"file_name": "a.png", "height": 40, "width": 60, "caption": caption}
    image["tokens_positive_eval"] = [[[0, len(caption)]]]
    spans = {"tokens_positive": [[12, 19]], "category_id": 1, "iscrowd": 0}
    boxes = [[5, 5, 10, 10], [30, 5, 10, 10]]
    content = {
        "images": [{**image, "id": 1}, {**image, "id": 2}, {**image, "id": 3}],
        "annotations": [
            *({"id": i, "image_id": 1, "bbox": box, **spans} for i, box in enumerate(boxes)),
            {"id": 9, "image_id": 3, "bbox": [0, 0, 0, 0], **spans, "empty": True},
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
    path = tmp_path / "grefexp.json"
    path.write_text(json.dumps(content))
    name = "grefexp_test_loader"
    DatasetCatalog.register(name, lambda: load_grounding_json(str(path), str(tmp_path), name))
    MetadataCatalog.get(name).set(
        ground_truth="refexp", evaluator_type="grefexp", json_file=str(path)
    )
    try:
        running = build_evaluator(name)
        assert type(running) is GeneralizedRefExpEvaluator
        running.reset()
        loader = build_test_loader(
            dataset=name,
            tokenizer="shapes",
            augmentations=[T.NoOpTransform()],
            batch_size=3,
            num_workers=0,
        )
        for batch in loader:
            outputs = []
            for item in batch:
                assert item["prompt"].num_targets == 1
                # Each row is about all words between the special tokens.
                asked = item["prompt"].positive_map[0] > 0
                assert int(asked.sum()) >= len(caption.split())
                found = Instances((40, 60))
                rows = boxes if item["image_id"] == 1 else []
                corners = [[x, y, x + w, y + h] for x, y, w, h in rows]
                found.pred_boxes = Boxes(torch.tensor(corners).float().reshape(-1, 4))
                found.scores = torch.full((len(rows),), 0.8)
                outputs.append({"instances": found})
            running.process(batch, outputs)
        results = running.evaluate()["grefexp"]
        assert set(results.values()) == {100.0}
        with pytest.raises(ValueError, match="Expression 2 asks for nothing.*tokens_positive_eval"):
            bare = copy.copy(batch[1]["prompt"])
            object.__setattr__(bare, "positive_map", torch.zeros_like(bare.positive_map))
            running.process([{**batch[1], "prompt": bare}], outputs[1:2])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
