"""What a training loader draws from: few shots, repeats, sampled classes, TSV files, bad images."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import islice

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from fiber_d2.data import build_test_loader, build_train_loader, register_coco_json
from fiber_d2.data.fewshot import few_shot_subset
from fiber_d2.data.tsv import load_tsv_dataset, write_tsv


def train_loader(datasets, **kwargs):
    options = {"tokenizer": "shapes", "augmentations": [], "total_batch_size": 1, "num_workers": 0}
    return build_train_loader(datasets=datasets, **{**options, **kwargs})


def first(loader, count):
    return [item for batch in islice(iter(loader), count) for item in batch]


def image_counts(loader, count):
    return Counter(item["image_id"] for item in first(loader, count))


def test_few_shots_are_the_only_images_seen(names):
    records = DatasetCatalog.get("tiny_detection")
    for seed in (None, 1, 2):
        expected = {records[i]["image_id"] for i in few_shot_subset(records, 1, seed=seed)}
        loader = train_loader(["tiny_detection"], few_shot=1, few_shot_seed=seed)
        assert len(expected) < 5 and set(image_counts(loader, 20)) == expected


def test_repeats_show_a_data_set_more_often(names):
    usable = 5
    loader = train_loader(["tiny_detection", "tiny_grounding"], repeats=[3, 1])
    captions = Counter("caption" in item for item in first(loader, 4 * usable))
    assert captions == {False: 3 * usable, True: usable}


def test_weights_change_at_a_step(names):
    loader = train_loader(
        ["tiny_detection", "tiny_grounding"],
        total_batch_size=2,
        weights={0: [1, 0], 3: [0, 1]},
    )
    captions = ["caption" in item for item in first(loader, 5)]
    assert captions == [False] * 6 + [True] * 4


def test_images_of_rare_classes_are_shown_more_often(names):
    plain = image_counts(train_loader(["tiny_detection"]), 50)
    assert set(plain.values()) == {10}
    # "cat" is in one image of five, "bus" in two, "hot_dog" in three.
    rare = image_counts(train_loader(["tiny_detection"], repeat_threshold=1.0), 400)
    share = {10: 5**0.5, 11: 2.5**0.5, 12: (5 / 3) ** 0.5, 13: (5 / 3) ** 0.5, 14: 2.5**0.5}
    for image_id, factor in share.items():
        assert rare[image_id] / 400 == pytest.approx(factor / sum(share.values()), abs=0.02)


def test_sampled_classes(names):
    loader = train_loader(
        ["tiny_detection"],
        sampled_classes={"num_negatives": 1, "control_probabilities": [0.0, 0.5, 0.5]},
    )
    lengths = Counter()
    for item in first(loader, 100):
        asked = item["prompt"].target_ids.tolist()
        present = set(item["instances"].gt_classes.tolist())
        assert present <= set(asked) and len(item["instances"]) > 0
        lengths[len(asked) - len(present)] += 1
        for box_class, row in zip(item["instances"].gt_classes, item["instances"].gt_positive_map):
            expected = item["prompt"].positive_map[asked.index(int(box_class))] > 0
            assert torch.equal(row, expected)
    assert set(lengths) == {0, 1} and min(lengths.values()) > 20


def test_boxes_of_classes_that_the_caption_leaves_out_are_left_out(names):
    loader = train_loader(["tiny_detection"], sampled_classes={"max_total": 1, "num_negatives": 0})
    kinds = {
        tuple(item["instances"].gt_classes.tolist())
        for item in first(loader, 40)
        if item["image_id"] == 10
    }
    # The first image shows a hot dog and a cat that is no crowd: one of them at a time.
    assert kinds == {(0,), (1,)}


def test_unknown_option_of_sampled_classes_is_named(names):
    with pytest.raises(ValueError, match="tiny_detection.*num_negative"):
        train_loader(["tiny_detection"], sampled_classes={"num_negative": 3})


def test_prompts_of_the_registration_are_asked(coco):
    register_coco_json(
        "tiny_worded",
        *coco[1:],
        class_names={7: "sausage"},
        prompts=[{"suffix": " in a bun"}, {}, {"prefix": "yellow "}],
    )
    options = {"dataset": "tiny_worded", "tokenizer": "shapes", "augmentations": []}
    for more, expected in (
        ({}, "sausage in a bun. cat. yellow bus"),
        ({"dataset_prompts": False}, "sausage. cat. bus"),
        ({"templates": "my {}"}, "my sausage. my cat. my bus"),
    ):
        loader = build_test_loader(**options, **more)
        assert {item["prompt"].text for batch in loader for item in batch} == {expected}
    DatasetCatalog.remove("tiny_worded")
    MetadataCatalog.remove("tiny_worded")


def test_long_captions_are_cut_where_asked(grounding, names):
    content, path, _ = grounding
    content["images"][2]["caption"] = "two " + "dogs " * 300
    with open(path, "w") as file:
        json.dump(content, file)
    with pytest.raises(ValueError, match="Image 12: .* but the limit is 256"):
        train_loader(["tiny_grounding"])
    items = first(train_loader(["tiny_grounding"], on_overflow="truncate"), 5)
    assert max(len(item["prompt"].input_ids) for item in items) == 256


@pytest.fixture
def tsv(coco, tmp_path):
    """The tiny detection set as TSV files, in the catalogue as ``tiny_tsv``."""
    content, _, root = coco
    names = {c["id"]: c["name"] for c in content["categories"]}
    images, labels, sizes = [], [], []
    for image in content["images"]:
        with open(f"{root}/{image['file_name']}", "rb") as file:
            images.append([str(image["id"]), base64.b64encode(file.read()).decode()])
        objects = [
            {"class": names[a["category_id"]], "rect": [x, y, x + w - 1, y + h - 1]}
            for a in content["annotations"]
            if a["image_id"] == image["id"] and not a["iscrowd"]
            for x, y, w, h in [a["bbox"]]
        ]
        labels.append([str(image["id"]), json.dumps(objects)])
        sizes.append([str(image["id"]), f"{image['height']} {image['width']}"])
    for stem, rows in (("img", images), ("label", labels), ("hw", sizes)):
        write_tsv(rows, str(tmp_path / f"{stem}.tsv"))
    order = {c["name"]: k for k, c in enumerate(content["categories"], 1)}
    (tmp_path / "labelmap.json").write_text(json.dumps(order))
    (tmp_path / "set.yaml").write_text(
        "{img: img.tsv, label: label.tsv, hw: hw.tsv, labelmap: labelmap.json}"
    )
    yaml_file = str(tmp_path / "set.yaml")
    DatasetCatalog.register("tiny_tsv", lambda: load_tsv_dataset(yaml_file, "tiny_tsv"))
    MetadataCatalog.get("tiny_tsv").set(ground_truth="detection", evaluator_type="coco")
    yield tmp_path
    DatasetCatalog.remove("tiny_tsv")
    MetadataCatalog.remove("tiny_tsv")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_tsv_and_json_give_the_same_steps(names, tsv, num_workers, grouped):
    def steps(name):
        loader = train_loader(
            [name], num_workers=num_workers, total_batch_size=2, aspect_ratio_grouping=grouped
        )
        return first(loader, 8)

    for one, other in zip(steps("tiny_detection"), steps("tiny_tsv")):
        assert one["image_id"] == other["image_id"]
        assert torch.equal(one["image"], other["image"])
        assert one["prompt"].text == other["prompt"].text
        assert torch.equal(one["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)
        assert torch.equal(one["instances"].gt_classes, other["instances"].gt_classes)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_left_out_in_training(names, coco, num_workers):
    with open(f"{coco[2]}/1.png", "wb") as file:
        file.write(b"no image")
    counts = image_counts(train_loader(["tiny_detection"], num_workers=num_workers), 6)
    assert set(counts) == {10, 12, 13, 14}
