"""Model inputs worked out by hand from a tiny data set."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from fiber_d2.data import (
    DetectionPrompter,
    FiberDatasetMapper,
    GroundingPrompter,
    load_detection_json,
    load_grounding_json,
)
from fiber_d2.text import load_tokenizer

TOKENIZER = load_tokenizer("shapes")
CLASSES = ["hot_dog", "cat", "bus"]


def words(prompt, marked):
    return [TOKENIZER.decode(prompt.input_ids[row]).strip() for row in marked]


def mapper(prompter, *, is_train=True, augmentations=(), **kwargs):
    return FiberDatasetMapper(
        is_train=is_train, prompter=prompter, augmentations=augmentations, **kwargs
    )


def test_detection_training(coco):
    record = load_detection_json(*coco[1:])[0]
    before = copy.deepcopy(record)
    item = mapper(DetectionPrompter(TOKENIZER, CLASSES))(record)
    assert record == before
    assert item["prompt"].text == "hot dog. cat. bus"
    instances = item["instances"]
    assert instances.image_size == (30, 40)
    # The crowd is left out; the box that leaves the image is clipped.
    assert instances.gt_boxes.tensor.tolist() == [[4, 6, 14, 18], [30, 20, 40, 30]]
    assert instances.gt_classes.tolist() == [0, 1]
    assert instances.gt_positive_map.dtype == torch.bool
    assert words(item["prompt"], instances.gt_positive_map) == ["hot dog", "cat"]
    pixels = np.asarray(Image.open(record["file_name"]))
    assert item["image"].dtype == torch.uint8
    np.testing.assert_array_equal(item["image"].numpy(), pixels[:, :, ::-1].transpose(2, 0, 1))
    assert (item["height"], item["width"], item["image_id"]) == (30, 40, 10)
    assert "annotations" not in item


def test_shuffled_classes_keep_their_words(coco):
    record = load_detection_json(*coco[1:])[0]
    shuffled = mapper(DetectionPrompter(TOKENIZER, CLASSES, shuffle=True))
    texts = set()
    for seed in range(20):
        np.random.seed(seed)
        item = shuffled(record)
        prompt, instances = item["prompt"], item["instances"]
        texts.add(prompt.text)
        assert words(prompt, instances.gt_positive_map) == ["hot dog", "cat"]
        assert instances.gt_classes.tolist() == [0, 1]
        by_target = [CLASSES[target].replace("_", " ") for target in prompt.target_ids.tolist()]
        assert words(prompt, prompt.positive_map > 0) == by_target
        assert prompt.text == ". ".join(by_target)
    assert len(texts) == 6


def test_boxes_and_map_follow_resize_and_flip(coco):
    record = load_detection_json(*coco[1:])[0]
    augmentations = [T.Resize((60, 80)), T.RandomFlip(prob=1.0)]
    item = mapper(DetectionPrompter(TOKENIZER, CLASSES), augmentations=augmentations)(record)
    assert tuple(item["image"].shape) == (3, 60, 80)
    assert item["instances"].image_size == (60, 80)
    assert item["instances"].gt_boxes.tensor.tolist() == [[52, 12, 72, 36], [0, 40, 20, 60]]
    assert (item["height"], item["width"]) == (30, 40)


def test_boxes_that_a_crop_empties_go_with_their_rows(coco):
    record = load_detection_json(*coco[1:])[0]
    crop = T.CropTransform(20, 10, 20, 20, orig_w=40, orig_h=30)
    item = mapper(DetectionPrompter(TOKENIZER, CLASSES), augmentations=[crop])(record)
    assert item["instances"].gt_boxes.tensor.tolist() == [[10, 10, 20, 20]]
    assert words(item["prompt"], item["instances"].gt_positive_map) == ["cat"]


def test_image_without_boxes(coco):
    record = load_detection_json(*coco[1:])[5]
    instances = mapper(DetectionPrompter(TOKENIZER, CLASSES))(record)["instances"]
    assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
    num_tokens = len(TOKENIZER("hot dog. cat. bus")["input_ids"])
    assert instances.gt_positive_map.shape == (0, num_tokens)
    assert instances.gt_classes.dtype == torch.int64


def test_detection_evaluation_has_one_prompt_or_several(coco):
    record = load_detection_json(*coco[1:])[0]
    item = mapper(DetectionPrompter(TOKENIZER, CLASSES), is_train=False)(record)
    assert item["prompt"].text == "hot dog. cat. bus"
    assert "instances" not in item and "annotations" not in item
    item = mapper(DetectionPrompter(TOKENIZER, CLASSES, max_classes=2), is_train=False)(record)
    assert [prompt.text for prompt in item["prompt"]] == ["hot dog. cat", "bus"]
    assert [prompt.target_ids.tolist() for prompt in item["prompt"]] == [[0, 1], [2]]


def test_training_with_too_many_classes_says_what_to_do(coco):
    record = load_detection_json(*coco[1:])[0]
    prompter = DetectionPrompter(TOKENIZER, CLASSES, max_tokens=6)
    with pytest.raises(ValueError, match="Image 10: 3 classes need 2 captions .* max_tokens"):
        mapper(prompter)(record)
    with pytest.raises(ValueError, match="Image 10: 3 classes need 2 captions"):
        mapper(prompter).check(record)
    mapper(prompter, is_train=False).check(record)


def test_grounding_training_has_one_target_for_each_set_of_spans(grounding):
    record = load_grounding_json(*grounding[1:])[0]
    record["annotations"][1]["iscrowd"] = 0
    item = mapper(GroundingPrompter(TOKENIZER))(record)
    assert item["prompt"].text == item["caption"] == "the dog left of a big cat"
    assert words(item["prompt"], item["prompt"].positive_map > 0) == ["the dog", "of a big cat"]
    assert item["instances"].gt_classes.tolist() == [0, 0, 1]
    assert words(item["prompt"], item["instances"].gt_positive_map) == [
        "the dog",
        "the dog",
        "of a big cat",
    ]
    assert (item["sentence_id"], item["original_img_id"]) == (0, 100)


def test_mirrored_image_has_a_mirrored_caption(grounding):
    record = load_grounding_json(*grounding[1:])[0]
    flip = [T.RandomFlip(prob=1.0)]
    item = mapper(GroundingPrompter(TOKENIZER), augmentations=flip)(record)
    assert item["caption"] == item["prompt"].text == "the dog right of a big cat"
    assert words(item["prompt"], item["instances"].gt_positive_map) == ["the dog", "of a big cat"]
    assert item["instances"].gt_boxes.tensor.tolist() == [[26, 6, 36, 18], [0, 20, 10, 30]]
    unchanged = mapper(GroundingPrompter(TOKENIZER), augmentations=flip, swap_left_right=False)
    assert unchanged(record)["caption"] == record["caption"]
    assert record["caption"] == "the dog left of a big cat"


def test_grounding_evaluation_targets(grounding):
    first, second = load_grounding_json(*grounding[1:])[:2]
    evaluate = mapper(GroundingPrompter(TOKENIZER), is_train=False)
    item = evaluate(first)
    assert words(item["prompt"], item["prompt"].positive_map > 0) == ["the dog", "a big cat"]
    assert "tokens_positive_eval" not in item
    item = evaluate(second)
    assert words(item["prompt"], item["prompt"].positive_map > 0) == ["a red kite"]


@pytest.mark.parametrize("is_train", [True, False])
def test_expression_without_spans_is_the_whole_caption(grounding, is_train):
    record = load_grounding_json(*grounding[1:])[1]
    record["annotations"][0]["tokens_positive"] = []
    item = mapper(GroundingPrompter(TOKENIZER, whole_caption=True), is_train=is_train)(record)
    assert words(item["prompt"], item["prompt"].positive_map > 0) == [record["caption"]]
    marked = item["prompt"].positive_map[0] > 0
    assert marked.tolist() == [False, *[True] * (len(marked) - 2), False]
    plain = mapper(GroundingPrompter(TOKENIZER))(record)
    assert not plain["instances"].gt_positive_map.any() and len(plain["instances"]) == 1


def test_missing_and_damaged_images(coco, tmp_path):
    record = load_detection_json(*coco[1:])[0]
    load = mapper(DetectionPrompter(TOKENIZER, CLASSES))
    with pytest.raises(FileNotFoundError, match=r"gone.png \(id 10\) does not exist"):
        load({**record, "file_name": str(tmp_path / "gone.png")})
    with open(record["file_name"], "rb") as file:
        content = file.read()
    for name, damaged in (("text.png", b"no image"), ("half.png", content[: len(content) // 2])):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} \(id 10\) cannot be read"):
            load({**record, "file_name": str(tmp_path / name)})
    with pytest.raises(ValueError, match="Mismatched image shape"):
        load({**record, "width": 41})


def test_bad_category_id(coco):
    record = load_detection_json(*coco[1:])[0]
    record["annotations"][0]["category_id"] = 3
    with pytest.raises(ValueError, match="Image 10: category_id 3 is none of .* 0 to 2"):
        mapper(DetectionPrompter(TOKENIZER, CLASSES))(record)


def test_shuffling_needs_common_templates():
    with pytest.raises(ValueError, match="cannot be shuffled"):
        DetectionPrompter(TOKENIZER, ["a"], templates=[{"name": "a"}], shuffle=True)


def test_an_expression_without_a_target_is_asked_for(grounding):
    record = {**load_grounding_json(*grounding[1:])[2], "annotations": []}
    item = mapper(GroundingPrompter(TOKENIZER, whole_caption=True), is_train=False)(record)
    assert words(item["prompt"], item["prompt"].positive_map > 0) == [record["caption"]]
    plain = mapper(GroundingPrompter(TOKENIZER), is_train=False)(record)
    assert plain["prompt"].num_targets == 0


def test_the_prompt_of_the_mirrored_image_is_added_where_it_differs(grounding):
    records = load_grounding_json(*grounding[1:])
    prompter = GroundingPrompter(TOKENIZER)
    load = FiberDatasetMapper(
        is_train=False, prompter=prompter, augmentations=[], mirrored_prompt=True
    )
    sided, plain = load(records[0]), load(records[2])
    assert sided["mirrored_prompt"].text == "the dog right of a big cat"
    assert sided["prompt"].text == "the dog left of a big cat"
    mirrored = sided["mirrored_prompt"]
    assert words(mirrored, mirrored.positive_map > 0) == ["the dog", "a big cat"]
    assert "mirrored_prompt" not in plain
