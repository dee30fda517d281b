"""Boxes, scores and images on their way in and out

SPEC_DATA_EVAL sections 0.1, 1.6, 1.9, 4.6, 5.1 and 5.6, ``f_merge_and_boxes.json``.

The original counts the corner (x2, y2) as part of a box ("inclusive"); this project keeps boxes
that end behind their last pixel ("continuous"): continuous = inclusive + (0, 0, 1, 1). Boxes go
through the reader and the mapper as in training and are compared under that rule.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from fiber_d2.data import (
    DetectionPrompter,
    FiberDatasetMapper,
    ResizeShortestEdgeTruncated,
    load_detection_json,
)
from fiber_d2.evaluation import GroundedCOCOEvaluator
from fiber_d2.evaluation.entities import EntityImage
from fiber_d2.evaluation.flickr import group_by_phrase
from fiber_d2.modeling import FIBER
from fiber_d2.modeling.postprocess import aggregate_token_scores
from fiber_d2.text import load_tokenizer

from .common import Section, read_json

# Boxes are float32, up to about 2000 pixels.
PIXEL_TOLERANCE = 5e-4
TOLERANCE = 1e-5
INCLUSIVE = torch.tensor([0.0, 0.0, 1.0, 1.0])
# Ways of making a class score of token scores that this project must have.
AGGREGATIONS = ("mean", "max", "power")


def check(directory: Path) -> Section:
    section = Section("f")
    content = read_json(directory, "f_merge_and_boxes.json")
    checks = {
        "merge_boxes": _check_merging,
        "class_aggregation": _check_aggregation,
        "flickr_grouping": _check_grouping,
        "boxlist": _check_boxes,
        "resize_sizes": _check_sizes,
        "grounding_box_prepare": _check_preparation,
    }
    for name, function in checks.items():
        for index, case in enumerate(content[name]):
            with section.case(f"{name}[{index}]"):
                function(section, case)
    with section.case("normalise"):
        _check_normalisation(section, content["normalise"])
    return section


def _check_merging(section: Section, case: dict[str, Any]) -> None:
    boxes = np.asarray(case["boxes"], dtype=np.float64).reshape(-1, 4)
    merged = EntityImage(boxes={"1": boxes}, sentences=()).merged().boxes["1"]
    section.close("merged", merged, case["merged"], 0.0)


def _check_aggregation(section: Section, case: dict[str, Any]) -> None:
    scores = torch.tensor(case["scores"])
    positive_map = torch.zeros(case["num_class"], scores.shape[-1])
    for label, tokens in case["label_to_tokens"]:
        if tokens:
            positive_map[label - 1, tokens] = 1 / len(tokens)
    positive_map = positive_map.expand(len(scores), -1, -1)
    for key, expected in case.items():
        match = re.fullmatch(r"expected_(fixed_width|mdetr)_(\w+)", key)
        if match is None:
            continue
        how = match[2].lower()
        try:
            found = aggregate_token_scores(scores, positive_map, how)
        except ValueError:
            # Raw slices of tokens (ONEHOT) are an option of the original that no published
            # configuration uses.
            if how in AGGREGATIONS:
                raise
            section.note(f"score aggregation {match[2]}, which this project does not offer")
            continue
        section.close(key, found, expected, TOLERANCE)


def _check_grouping(section: Section, case: dict[str, Any]) -> None:
    boxes = Boxes(torch.tensor(case["boxes"], dtype=torch.float32).reshape(-1, 4))
    ratio = np.divide(case["original_size_wh"], case["network_size_wh"])
    boxes.scale(*ratio.tolist())
    grouped, scores = group_by_phrase(
        boxes.tensor.numpy(),
        np.asarray(case["scores"], dtype=np.float32),
        np.asarray(case["labels"], dtype=np.int64) - 1,
        case["n_phrases"],
    )
    expected = case["expected"]
    section.equal("number of phrases", len(grouped), len(expected["boxes"]))
    for index, (found, wanted) in enumerate(zip(grouped, expected["boxes"])):
        section.close(f"boxes of phrase {index}", found, wanted, PIXEL_TOLERANCE)
    section.equal("phrases with scores", len(scores), len(expected["scores"]))
    for index, (found, wanted) in enumerate(zip(scores, expected["scores"])):
        section.close(f"scores of phrase {index}", found, wanted, 1e-6)


def _check_boxes(section: Section, case: dict[str, Any]) -> None:
    (width, height), (new_width, new_height) = case["size_wh"], case["resized_to_wh"]
    annotations = [
        {"bbox": box, "category_id": index, "iscrowd": 0} for index, box in enumerate(case["xywh"])
    ]
    size = case["size_wh"]

    def through(*augmentations: T.Transform) -> tuple[torch.Tensor, torch.Tensor]:
        instances = _training_item(size, annotations, augmentations)["instances"]
        return instances.gt_boxes.tensor, instances.gt_classes

    # xywh -> xyxy: the inclusive corner lies a pixel before the continuous one, never before x1.
    xywh = torch.tensor(case["xywh"], dtype=torch.float64)
    corners = xywh.clone()
    corners[:, 2:] += xywh[:, :2]
    inclusive = torch.cat([xywh[:, :2], torch.maximum(corners[:, 2:] - 1, xywh[:, :2])], dim=1)
    section.close("xyxy", inclusive, case["xyxy"], PIXEL_TOLERANCE)

    boxes, labels = through()
    large = _larger_than_a_pixel(boxes)
    boxes, labels = boxes[large], labels[large]
    section.equal("clipped_keep", labels, case["clipped_keep"])
    section.close("clipped_xyxy", boxes - INCLUSIVE, case["clipped_xyxy"], PIXEL_TOLERANCE)
    section.close("area", Boxes(boxes).area(), case["area_of_clipped"], 0.1)

    flipped, flipped_labels = through(T.HFlipTransform(width))
    flipped = flipped[torch.isin(flipped_labels, labels)]
    section.close("hflip", flipped - INCLUSIVE, case["hflip_of_clipped"], PIXEL_TOLERANCE)

    # Resizing multiplies inclusive corners, so that the pixel between them and ours is resized.
    resized, resized_labels = through(T.ResizeTransform(height, width, new_height, new_width))
    resized = resized[torch.isin(resized_labels, labels)]
    pixel = INCLUSIVE * torch.tensor([0.0, 0.0, new_width / width, new_height / height])
    section.close("resized", resized - pixel, case["resized_of_clipped"], PIXEL_TOLERANCE)

    found = _written_as_coco(size, torch.tensor(case["clipped_xyxy"]).reshape(-1, 4))
    section.close("back_to_xywh", found, case["back_to_xywh"], PIXEL_TOLERANCE)


def _check_sizes(section: Section, case: dict[str, Any]) -> None:
    width, height = case["wh"]
    augmentation = ResizeShortestEdgeTruncated(case["min_size"], case["max_size"])
    image = np.broadcast_to(np.zeros((), dtype=np.uint8), (height, width, 3))
    transform = augmentation.get_transform(image)
    section.equal("out_hw", [transform.new_h, transform.new_w], case["out_hw"])


def _check_preparation(section: Section, case: dict[str, Any]) -> None:
    item = _training_item(case["image_wh"], case["annotations"])
    boxes, labels = item["instances"].gt_boxes.tensor, item["instances"].gt_classes
    large = _larger_than_a_pixel(boxes)
    category_ids = sorted({a["category_id"] for a in case["annotations"]})
    found = [category_ids[label] for label in labels[large].tolist()]
    expected = case["expected"]
    section.equal("labels", found, expected["labels"])
    wanted = np.reshape(expected["boxes"], (-1, 4))
    section.close("boxes", boxes[large] - INCLUSIVE, wanted, PIXEL_TOLERANCE)
    section.equal("orig_size_hw", [item["height"], item["width"]], expected["orig_size_hw"])
    # "Spans kept in step": each box has the words of its own class.
    own = item["prompt"].positive_map[labels] > 0
    section.equal("words of the boxes", item["instances"].gt_positive_map, own)


def _check_normalisation(section: Section, case: dict[str, Any]) -> None:
    pixels = np.asarray(case["rgb_uint8_hwc"], dtype=np.uint8)
    height, width = pixels.shape[:2]
    item = _training_item((width, height), [], pixels=pixels)
    backbone = nn.Module()
    backbone.size_divisibility = 32
    model = FIBER(
        backbone=backbone, head=nn.Module(), pixel_mean=case["mean"], pixel_std=case["std"]
    )
    (image,) = model.preprocess_images([item]).tensor
    section.close("image", image[:, :height, :width], case["expected_chw"], TOLERANCE)
    section.true("padded to 32", all(side % 32 == 0 for side in image.shape[1:]))
    padding = image[:, height:].abs().sum() + image[:, :, width:].abs().sum()
    section.equal("padding", padding.item(), 0.0)


def _larger_than_a_pixel(boxes: torch.Tensor) -> torch.Tensor:
    """Which boxes the original keeps: inclusive corners must differ in both directions.

    The tolerance is that of float32 corners; a box of exactly a pixel is not kept.
    """
    return ((boxes[:, 2:] - boxes[:, :2]) > 1 + PIXEL_TOLERANCE).all(dim=1)


def _training_item(
    size_wh: Sequence[int],
    annotations: Sequence[dict[str, Any]],
    augmentations: Sequence[T.Transform] = (),
    *,
    pixels: np.ndarray | None = None,
) -> dict[str, Any]:
    """An image and its COCO annotations on disk, read and mapped as in training."""
    width, height = size_wh
    if pixels is None:
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
    category_ids = sorted({a["category_id"] for a in annotations}) or [1]
    content = {
        "images": [{"id": 1, "file_name": "image.png", "width": width, "height": height}],
        "annotations": [
            {**annotation, "id": index, "image_id": 1}
            for index, annotation in enumerate(annotations, start=1)
        ],
        "categories": [{"id": id_, "name": f"thing {id_}"} for id_ in category_ids],
    }
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(pixels).save(Path(folder) / "image.png")
        json_file = Path(folder) / "instances.json"
        json_file.write_text(json.dumps(content))
        (record,) = load_detection_json(str(json_file), folder)
        names = [category["name"] for category in content["categories"]]
        prompter = DetectionPrompter(load_tokenizer("shapes"), names, max_tokens=100_000)
        mapper = FiberDatasetMapper(
            is_train=True, prompter=prompter, augmentations=list(augmentations)
        )
        return mapper(record)


def _written_as_coco(size_wh: Sequence[int], boxes: torch.Tensor) -> list[list[float]]:
    """Boxes with inclusive corners in the result file of the COCO evaluator, in their order."""
    width, height = size_wh
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.ones(len(boxes))
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    name = "check_fixtures_boxes"
    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder) / "instances.json"
        image = {"id": 1, "file_name": "image.png", "width": width, "height": height}
        # Without annotations predictions are written, not scored.
        content = {"images": [image], "categories": [{"id": 0, "name": "thing"}]}
        json_file.write_text(json.dumps(content))
        MetadataCatalog.get(name).set(json_file=str(json_file))
        try:
            evaluator = GroundedCOCOEvaluator(
                name, output_dir=folder, legacy_boxes=True, distributed=False
            )
            evaluator.process([{"image_id": 1}], [{"instances": instances}])
            evaluator.evaluate()
        finally:
            MetadataCatalog.remove(name)
        results = json.loads((Path(folder) / "coco_instances_results.json").read_text())
    return [result["bbox"] for result in results]
