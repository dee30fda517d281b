"""Referring expressions: is one of the first k boxes on the object the expression means?"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from fiber_d2.evaluation.expressions import (
    ExpressionEvaluator,
    arrays_of,
    match_records,
    xywh_corners,
)
from fiber_d2.evaluation.overlap import first_hit_ranks
from fiber_d2.evaluation.records import Record

logger = logging.getLogger(__name__)

_NO_BOXES = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0, np.float32)}


@dataclass(frozen=True)
class Expressions:
    """Ground truth of N expressions.

    Attributes:
        ids: their "image" ids, one per expression.
        datasets: ``(N,)`` name of the data set each belongs to.
        boxes: float64 ``(N, 4)``, XYXY (``x + w``, ``y + h``: continuous), the object meant.
        candidates: per expression float64 ``(c, 4)`` XYXY, the objects among which the
            expression chooses, or None where the file does not name them.
    """

    ids: tuple[int, ...]
    datasets: np.ndarray
    boxes: np.ndarray
    candidates: tuple[np.ndarray | None, ...]

    @property
    def dataset_names(self) -> list[str]:
        """Each name once, in file order."""
        return list(dict.fromkeys(self.datasets.tolist()))


def parse_expressions(content: Mapping[str, Any]) -> Expressions:
    """Ground truth of a file with one "image" and one annotation per expression.

    Raises:
        ValueError: where the content is not such a file, or an expression has not exactly one box.
    """
    if not {"images", "annotations"} <= set(content):
        raise ValueError("A file of referring expressions needs 'images' and 'annotations'.")
    boxes: dict[int, list[float]] = {}
    for annotation in content["annotations"]:
        image_id = annotation["image_id"]
        if image_id in boxes:
            raise ValueError(f"Expression {image_id} has more than one box.")
        boxes[image_id] = annotation["bbox"]
    images = content["images"]
    if not images:
        raise ValueError("The file of referring expressions has no expression.")
    without = [image["id"] for image in images if image["id"] not in boxes]
    if without:
        raise ValueError(
            f"{len(without)} expressions have no box, for example {without[:5]}: each 'image' "
            "needs exactly one annotation."
        )
    return Expressions(
        ids=tuple(image["id"] for image in images),
        datasets=np.asarray([image.get("dataset_name", "refexp") for image in images]),
        boxes=xywh_corners([boxes[image["id"]] for image in images]),
        candidates=tuple(
            xywh_corners(image["candidates"]) if "candidates" in image else None for image in images
        ),
    )


def ranked_predictions(expressions: Expressions, records: Sequence[Record]) -> list[np.ndarray]:
    """The predicted boxes of every expression, best first.

    Args:
        records: ``{"image_id", "boxes" (n, 4) XYXY, "scores" (n,)}`` in any order, one per
            expression; of repeated ones the first counts, unknown ones do not.

    Returns:
        Per expression float32 ``(n, 4)``; empty, and so a miss, where there is no record.
    """
    found = match_records(expressions.ids, records, consequence="each counts as a miss")
    return [_ranked_boxes(_NO_BOXES if record is None else record) for record in found]


def expression_precision(
    expressions: Expressions,
    records: Sequence[Record],
    *,
    topk: Sequence[int] = (1, 5, 10),
    iou_thresh: float = 0.5,
    generalized: bool = False,
) -> dict[str, list[float]]:
    """P@k in 0..1 of saved predictions, per data set name, in the order of ``topk``.

    Args:
        records: as in ``ranked_predictions``.
        iou_thresh: a box hits at this overlap (inclusive).
        generalized: measure by GIoU, as the original code does; it never exceeds IoU.
    """
    ranked = ranked_predictions(expressions, records)
    ranks = _hit_ranks(expressions, ranked, iou_thresh, generalized)
    return {
        name: [float((ranks[expressions.datasets == name] < k).mean()) for k in topk]
        for name in expressions.dataset_names
    }


class RefExpEvaluator(ExpressionEvaluator):
    """P@k of referring expressions: the share whose first k boxes hold one on the object meant.

    Results, in percent: ``{"refexp": {"P@1", "P@1_giou", "<data set>/P@1", ...}}``. Names without
    prefix count all expressions of the file, prefixed ones those of one ``dataset_name`` of the
    file. The plain figures use IoU, the usual measure; "_giou" those of the original code.

    Args:
        dataset_name: registered data set; its metadata give ``json_file``.
        json_file: the file of expressions, instead.
        topk: boxes looked at per expression.
        iou_thresh: a box hits at this overlap (inclusive).
        output_dir: where to save ``refexp_predictions.json``, if anywhere.
        distributed: gather the predictions of all processes.

    Raises:
        ValueError, FileNotFoundError: where ground truth is not named, not there, or not of the
            form of ``parse_expressions``.
    """

    file_name = "refexp_predictions.json"
    empty_entry = "An expression without a box has an entry too, with empty lists."
    parse = staticmethod(parse_expressions)

    def __init__(
        self,
        dataset_name: str | None = None,
        *,
        json_file: str | os.PathLike[str] | None = None,
        topk: Sequence[int] = (1, 5, 10),
        iou_thresh: float = 0.5,
        output_dir: str | os.PathLike[str] | None = None,
        distributed: bool = True,
    ) -> None:
        if not topk or min(topk) < 1:
            raise ValueError(f"topk must hold positive numbers, got {topk}.")
        super().__init__(dataset_name, json_file, output_dir, distributed)
        self._topk = tuple(topk)
        self._iou_thresh = iou_thresh

    def score(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Results of saved predictions; see ``ranked_predictions`` for their form."""
        results: dict[str, float] = OrderedDict()
        ranked = ranked_predictions(self.expressions, records)
        for suffix, generalized in (("", False), ("_giou", True)):
            ranks = _hit_ranks(self.expressions, ranked, self._iou_thresh, generalized)
            for prefix, members in self.groups():
                for k in self._topk:
                    results[f"{prefix}P@{k}{suffix}"] = 100 * float((ranks[members] < k).mean())
        return OrderedDict(refexp=results)

    def log(self, results: dict[str, dict[str, float]]) -> None:
        _log_table(results["refexp"], self._topk, self.expressions)


def _hit_ranks(
    expressions: Expressions, ranked: list[np.ndarray], iou_thresh: float, generalized: bool
) -> np.ndarray:
    # Single precision, as in the original, so that borderline boxes fall on the same side.
    return first_hit_ranks(
        ranked,
        expressions.boxes[:, None],
        threshold=iou_thresh,
        generalized=generalized,
        dtype=np.float32,
    )


def _ranked_boxes(record: Record) -> np.ndarray:
    """Boxes best first; of equal scores the larger (x1, y1, x2, y2) first, as in the original."""
    boxes, scores = arrays_of(record, np.float32)
    return boxes[np.lexsort((*-boxes.T[::-1], -scores))]


def _log_table(results: Mapping[str, float], topk: Sequence[int], expressions: Expressions) -> None:
    columns = [f"P@{k}{suffix}" for suffix in ("", "_giou") for k in topk]
    rows = [["all", len(expressions.ids), *(results[column] for column in columns)]]
    rows += [
        [
            name,
            int((expressions.datasets == name).sum()),
            *(results[f"{name}/{column}"] for column in columns),
        ]
        for name in expressions.dataset_names
    ]
    table = tabulate(
        rows, headers=["in %", "expressions", *columns], floatfmt=".2f", tablefmt="pipe"
    )
    logger.info("Referring expressions:\n%s", table)
