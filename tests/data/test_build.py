"""Whole loaders over files on disk."""

from __future__ import annotations

import json
import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from fiber_d2.data import (
    ResizeShortestEdgeTruncated,
    build_test_loader,
    build_train_loader,
    register_coco_json,
)
from fiber_d2.data.mapper import FiberDatasetMapper
from fiber_d2.data.records import MAX_CHECKED, filter_records
from fiber_d2.structures import Prompt

FLIP = [T.RandomFlip(prob=0.5), T.RandomBrightness(0.5, 1.5)]


def train_loader(datasets, **kwargs):
    options = {
        "tokenizer": "shapes",
        "augmentations": FLIP,
        "total_batch_size": 4,
        "num_workers": 0,
        **kwargs,
    }
    return build_train_loader(datasets=datasets, **options)


def fingerprint(batch):
    """What a training step sees of each image."""
    return [
        (
            item["image_id"],
            item["prompt"].text,
            int(item["image"].long().sum()),
            item["instances"].gt_boxes.tensor.tolist(),
            item["instances"].gt_positive_map.tolist(),
        )
        for item in batch
    ]


def steps(loader, count):
    return [fingerprint(batch) for batch in islice(iter(loader), count)]


def test_training_batches_mix_tasks_and_leave_out_empty_images(names):
    seen = set()
    for batch in islice(iter(train_loader(list(names))), 10):
        assert isinstance(batch, list) and len(batch) == 4
        for item in batch:
            seen.add((item["image_id"], "caption" in item))
            assert len(item["instances"]) > 0
            assert item["instances"].gt_positive_map.any(dim=1).all()
            assert item["instances"].gt_positive_map.shape[1] == item["prompt"].num_tokens
    assert seen == {(10 + k, grounding) for k in range(5) for grounding in (False, True)}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_steps_do_not_depend_on_workers(names, num_workers):
    options = {"weights": [2, 1], "seed": 3, "shuffle_classes": True}
    expected = steps(train_loader(list(names), **options), 8)
    assert steps(train_loader(list(names), num_workers=num_workers, **options), 8) == expected
    assert steps(train_loader(list(names), **{**options, "seed": 4}), 8) != expected


def test_a_continued_run_sees_what_it_would_have_seen(names):
    expected = steps(train_loader(list(names), seed=1), 12)
    assert steps(train_loader(list(names), seed=1, start_index=7), 5) == expected[7:]
    assert len({str(step) for step in expected}) == 12


def test_processes_see_the_same_images_in_the_same_augmentation(names, monkeypatch):
    whole = steps(train_loader(list(names)), 6)
    shares = []
    for rank in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            patch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
            shares.append(steps(train_loader(list(names)), 6))
    for one, first, second in zip(whole, *shares):
        assert one[0::2] == first and one[1::2] == second


def test_loading_leaves_the_generators_of_the_training_alone(names):
    iterator = iter(train_loader(list(names)))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    next(iterator)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_aspect_ratio_grouping(names):
    for batch in islice(iter(train_loader(list(names), aspect_ratio_grouping=True)), 10):
        assert len({item["width"] > item["height"] for item in batch}) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_test_loader_shows_each_image_once(names, num_workers):
    for name in names:
        loader = build_test_loader(
            dataset=name,
            tokenizer="shapes",
            augmentations=[],
            batch_size=4,
            num_workers=num_workers,
        )
        batches = list(loader)
        assert [len(batch) for batch in batches] == [4, 2] and len(loader) == 2
        items = [item for batch in batches for item in batch]
        assert [item["image_id"] for item in items] == [10, 11, 12, 13, 14, 15]
        assert all(isinstance(item["prompt"], Prompt) for item in items)
        assert not any("instances" in item for item in items)


def test_test_loader_shares_images_among_processes(names, monkeypatch):
    ids = []
    for rank in range(4):
        with monkeypatch.context() as patch:
            patch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            patch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
            loader = build_test_loader(
                dataset=names[0], tokenizer="shapes", augmentations=[], num_workers=0
            )
        ids.append([item["image_id"] for batch in loader for item in batch])
    assert ids == [[10, 11], [12, 13], [14], [15]]


def test_many_classes_make_several_prompts(names):
    loader = build_test_loader(
        dataset=names[0], tokenizer="shapes", augmentations=[], num_workers=0, max_tokens=6
    )
    prompts = next(iter(loader))[0]["prompt"]
    assert [prompt.text for prompt in prompts] == ["hot dog. cat", "bus"]
    with pytest.raises(ValueError, match="'tiny_detection': Image 10: 3 classes need 2 captions"):
        train_loader([names[0]], max_tokens=6)


def test_unknown_and_missing_data_sets(names):
    with pytest.raises(KeyError, match="'tiny_detektion' is not registered. Did you mean tiny_det"):
        train_loader(["tiny_detektion"])
    with pytest.raises(ValueError, match="There is no training data set"):
        train_loader([])
    DatasetCatalog.register("tiny_odd", lambda: DatasetCatalog.get("tiny_detection"))
    MetadataCatalog.get("tiny_odd").ground_truth = "masks"
    with pytest.raises(ValueError, match="ground_truth='masks'"):
        train_loader(["tiny_odd"])
    MetadataCatalog.remove("tiny_odd")
    with pytest.raises(ValueError, match="'tiny_odd' does not name its classes"):
        train_loader(["tiny_odd"])
    DatasetCatalog.remove("tiny_odd")
    MetadataCatalog.remove("tiny_odd")


def test_nothing_to_learn_from(coco):
    content, path, root = coco
    content["annotations"] = [
        {"id": 1, "image_id": 10, "bbox": [0, 0, 9, 9], "category_id": 7, "iscrowd": 1},
        {"id": 2, "image_id": 11, "bbox": [0, 0, 9, 1], "category_id": 7, "iscrowd": 0},
    ]
    with open(path, "w") as file:
        json.dump(content, file)
    register_coco_json("tiny_useless", path, root)
    message = "'tiny_useless' has nothing to learn from: of its 6 images 4 have no annotation"
    with pytest.raises(ValueError, match=message):
        train_loader(["tiny_useless"])
    batch = next(iter(train_loader(["tiny_useless"], filter_empty=False)))
    assert len(batch) == 4
    DatasetCatalog.remove("tiny_useless")
    MetadataCatalog.remove("tiny_useless")


def test_class_without_tokens_stops_before_training(coco):
    content, path, root = coco
    content["categories"][1]["name"] = "(cat)"
    with open(path, "w") as file:
        json.dump(content, file)
    register_coco_json("tiny_nameless", path, root)
    with pytest.raises(ValueError, match=r"'tiny_nameless': The class '\(cat\)'"):
        train_loader(["tiny_nameless"])
    DatasetCatalog.remove("tiny_nameless")
    MetadataCatalog.remove("tiny_nameless")


def test_missing_image_and_long_caption_stop_before_training(names, grounding):
    content, path, root = grounding
    content["images"][2]["caption"] = "dog " * 300
    with open(path, "w") as file:
        json.dump(content, file)
    message = "'tiny_grounding': Image 12: The caption 'dog dog .* but the limit is 256"
    for build in (
        lambda: train_loader(["tiny_grounding"]),
        lambda: build_test_loader(dataset="tiny_grounding", tokenizer="shapes", augmentations=[]),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    content["images"][0]["file_name"] = "gone.png"
    with open(path, "w") as file:
        json.dump(content, file)
    with pytest.raises(FileNotFoundError, match="'tiny_grounding' lacks the image .*gone.png"):
        train_loader(["tiny_grounding"])


def test_checks_before_training_are_bounded_and_spread(names, grounding, monkeypatch):
    record = DatasetCatalog.get("tiny_grounding")[0]
    count = 25_000
    records = [dict(record, image_id=number) for number in range(count)]
    DatasetCatalog.register("tiny_many", lambda: records)
    MetadataCatalog.get("tiny_many").ground_truth = "grounding"
    seen = []
    monkeypatch.setattr(FiberDatasetMapper, "check", lambda _, one: seen.append(one["image_id"]))
    train_loader(["tiny_many"])
    assert len(set(seen)) == len(seen) == MAX_CHECKED
    gaps = np.diff([*sorted(seen), count])
    assert seen[0] == 0 and gaps.max() <= 3
    DatasetCatalog.remove("tiny_many")
    MetadataCatalog.remove("tiny_many")


def test_filter_understands_both_box_modes():
    def record(box, mode):
        return {"annotations": [{"bbox": box, "bbox_mode": mode}]}

    good = [record([5, 5, 2, 2], BoxMode.XYWH_ABS), record([5, 5, 7, 7], BoxMode.XYXY_ABS)]
    bad = [record([5, 5, 1, 9], BoxMode.XYWH_ABS), record([5, 5, 6, 9], BoxMode.XYXY_ABS)]
    assert filter_records(good + bad, "x") == good


def test_lazy_config_nodes(names):
    augmentations = [
        L(ResizeShortestEdgeTruncated)(
            short_edge_length=(20, 24), max_size=40, sample_style="choice"
        ),
        L(T.RandomFlip)(prob=0.5),
    ]
    train = L(build_train_loader)(
        datasets=list(names),
        tokenizer="shapes",
        augmentations=augmentations,
        total_batch_size=4,
        num_workers=1,
        weights=[0.5, 0.5],
    )
    sides = {min(item["image"].shape[1:]) for item in next(iter(instantiate(train)))}
    assert sides <= {20, 24}
    test = L(build_test_loader)(
        dataset=names[0],
        tokenizer="shapes",
        augmentations=augmentations[:1],
        num_workers=0,
        templates=[{"prefix": "a ", "name": name, "suffix": ""} for name in ("x", "y", "z")],
    )
    assert next(iter(instantiate(test)))[0]["prompt"].text == "a x. a y. a z"
