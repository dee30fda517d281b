"""LVIS: FixedAP and AP with a limit per image

SPEC_DATA_EVAL section 3, ``c_lvis_gt.json``, ``c_lvis_detections.npz``, ``c_lvis_expected.json``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from fiber_d2.data.categories import read_categories
from fiber_d2.evaluation import LVISFixedAPEvaluator, score_lvis

from .common import Section, read_json

TOLERANCE = 1e-9
TRUTH, FOUND, EXPECTED = "c_lvis_gt.json", "c_lvis_detections.npz", "c_lvis_expected.json"
# "fixed_ap_topk25", "normal_ap_per_image300", "lvis_package_maxdets20": the kind and its limit.
_TABLE = re.compile(
    r"((?P<fixed>fixed_ap_topk)|normal_ap_per_image|lvis_package_maxdets)(?P<limit>\d+)"
)
# The limit's argument, and where the results are.
_FIXED = ("topk_per_class", "bbox")
_PER_IMAGE = ("max_dets_per_image", "bbox_per_image")
# Images given to the evaluator at a time.
BATCH = 3


def check(directory: Path) -> Section:
    section = Section("c")
    expected = read_json(directory, EXPECTED)
    truth = read_json(directory, TRUTH)
    found = _read_detections(directory / FOUND)
    section.equal("detections", len(found["scores"]), expected["n_detections"])
    orders = dict(_orders(found, expected["class_chunks"]))
    for name, order in orders.items():
        same = sorted(order.tolist()) == list(range(len(found["scores"])))
        section.true(f"{name} holds every detection once", same)
    for name, table in expected["expected"].items():
        with section.case(name):
            match = _TABLE.fullmatch(name)
            if match is None:
                raise ValueError("no such kind of AP is known")
            key, kind = _FIXED if match["fixed"] else _PER_IMAGE
            limits = {key: int(match["limit"])}
            for order_name, order in orders.items():
                with section.case(order_name):
                    results = score_lvis(truth, _records(found, order), **limits)
                    _compare(section, results[kind], table)
                with section.case(f"evaluator, {order_name}"):
                    results = _evaluate(directory / TRUTH, truth, found, order, limits)
                    in_shares = {metric: v / 100 for metric, v in results[kind].items()}
                    _compare(section, in_shares, table)
    return section


def _read_detections(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing in {path.parent}.")
    with np.load(path) as content:
        return {key: content[key] for key in ("image_id", "category_id", "boxes_xyxy", "scores")}


def _orders(
    found: dict[str, np.ndarray], class_chunks: Sequence[Sequence[int]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Ways of feeding the detections: row numbers. None of them may change the result."""
    categories, rows = found["category_id"], np.arange(len(found["scores"]))
    chunks = [rows[np.isin(categories, chunk)] for chunk in class_chunks]
    yield "in class chunks", np.concatenate(chunks)
    yield "last chunk first", np.concatenate(chunks[::-1])
    yield "class by class, worst first", np.lexsort((found["scores"], categories))
    yield "image by image", np.argsort(found["image_id"], kind="stable")
    yield "shuffled", np.random.default_rng(0).permutation(rows)


def _records(found: dict[str, np.ndarray], order: np.ndarray) -> list[dict[str, Any]]:
    # Widths in single precision, as the original computes them.
    boxes = found["boxes_xyxy"][order]
    boxes[:, 2:] -= boxes[:, :2]
    columns = (found["image_id"][order], found["category_id"][order], boxes, found["scores"][order])
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in zip(*(column.tolist() for column in columns))
    ]


def _evaluate(
    json_file: Path,
    truth: dict[str, Any],
    found: dict[str, np.ndarray],
    order: np.ndarray,
    limits: dict[str, int],
) -> dict[str, dict[str, float]]:
    """What the evaluator says, given images in order of their first row, some at a time."""
    name = f"fixture_check_{json_file}"
    contiguous = read_categories(truth, str(json_file)).contiguous
    MetadataCatalog.get(name).set(
        json_file=str(json_file), thing_dataset_id_to_contiguous_id=contiguous
    )
    try:
        evaluator = LVISFixedAPEvaluator(name, distributed=False, **limits)
    finally:
        MetadataCatalog.remove(name)
    rows_of: dict[int, list[int]] = {}
    for row in order.tolist():
        rows_of.setdefault(int(found["image_id"][row]), []).append(row)
    inputs = [{"image_id": image_id} for image_id in rows_of]
    outputs = []
    for rows in rows_of.values():
        instances = Instances((0, 0))
        instances.pred_boxes = Boxes(torch.from_numpy(found["boxes_xyxy"][rows]))
        instances.scores = torch.from_numpy(found["scores"][rows])
        instances.pred_classes = torch.tensor(
            [contiguous[int(found["category_id"][r])] for r in rows]
        )
        outputs.append({"instances": instances})
    for start in range(0, len(inputs), BATCH):
        evaluator.process(inputs[start : start + BATCH], outputs[start : start + BATCH])
    return evaluator.evaluate()


def _compare(section: Section, found: dict[str, float], table: dict[str, float]) -> None:
    for key, expected in table.items():
        # "AR@300" and "AR@-1": the limit is part of the case's name. -1: undefined, our NaN.
        value = found[key.split("@")[0]]
        section.close(key, -1.0 if math.isnan(value) else value, expected, TOLERANCE)
