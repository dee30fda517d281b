"""Few-shot selections: against the reference, and against the rule by brute force."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.data.fewshot import few_shot_subset, prepared_file_name
from fiber_d2.data.readers import load_detection_json

CASES = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "data_eval" / "h_fewshot.json").read_text()
)["cases"]


def record(image_id, *categories, side=9, crowd=0, mode=BoxMode.XYWH_ABS):
    bbox = [5, 5, side, side] if mode == BoxMode.XYWH_ABS else [5, 5, 5 + side, 5 + side]
    entry = {"bbox": bbox, "bbox_mode": mode, "iscrowd": crowd}
    return {"image_id": image_id, "annotations": [{**entry, "category_id": c} for c in categories]}


@pytest.mark.parametrize("case", CASES)
def test_selection_of_a_coco_file(case, tmp_path):
    """Through the reader, whose category ids are contiguous, and then as the original chose."""
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(case["dataset"]))
    records = load_detection_json(str(path), str(tmp_path))
    for name, expected in case["expected"].items():
        if name.startswith("CocoGrounding") and expected != "IndexError":
            shots = int(name.split("_shot")[1].split("_")[0])
            chosen = few_shot_subset(records, shots)
            assert [records[index]["image_id"] for index in chosen] == expected


images = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5).map(lambda c: c * 37), max_size=4), st.sampled_from([1, 9])
    ),
    max_size=12,
)


@given(images, st.integers(1, 3), st.none() | st.integers(0, 5), st.randoms())
@settings(max_examples=60, deadline=None)
def test_an_image_is_taken_if_a_class_is_wanted(images, k, seed, order):
    records = [
        record(3 * number, *categories, side=side)
        for number, (categories, side) in enumerate(images)
    ]
    order.shuffle(records)
    chosen = few_shot_subset(records, k, seed=seed)
    # Invalid images: no box, or boxes of a pixel.
    valid = sorted(
        r["image_id"] for r in records if any(min(a["bbox"][2:]) > 1 for a in r["annotations"])
    )
    if seed is not None:
        random.Random(seed).shuffle(valid)
    by_id = {r["image_id"]: {a["category_id"] for a in r["annotations"]} for r in records}
    taken, counts = [], Counter()
    for image_id in valid:
        if any(counts[category] < k for category in by_id[image_id]):
            taken.append(image_id)
            counts.update(by_id[image_id])
    assert [records[index]["image_id"] for index in chosen] == taken
    available = Counter(category for image_id in valid for category in by_id[image_id])
    assert all(counts[category] >= min(k, number) for category, number in available.items())


def test_crowds_count_and_one_pixel_boxes_do_not():
    records = [
        record(1, 0, crowd=1),
        record(2, 0),
        record(3, 1, side=1),
        record(4),
        record(5, 1, side=1.5, mode=BoxMode.XYXY_ABS),
    ]
    assert few_shot_subset(records, 1) == [0, 4]
    assert few_shot_subset(records, 0, seed=3) == [0, 1, 4]
    assert few_shot_subset([], 1) == []


def test_errors():
    with pytest.raises(ValueError, match="negative"):
        few_shot_subset([], -1)
    with pytest.raises(ValueError, match="mix numbers and text"):
        few_shot_subset([record(1, 0), record("a", 0)], 1)


def test_name_of_prepared_files():
    assert prepared_file_name(3, 30) == "fewshot_train_shot3_seed30.json"
