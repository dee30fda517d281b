"""Generalised referring expressions: an expression means no object, one, or several.

The measures of gRefCOCO (GREC, arXiv:2308.16182). An expression is answered by the set of its
boxes above a score, not by a ranking.
"""

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
from fiber_d2.evaluation.overlap import box_overlap
from fiber_d2.evaluation.records import Record
from fiber_d2.structures import Prompt

logger = logging.getLogger(__name__)

_METRICS = ("Pr@F1", "Pr@F1_giou", "N-acc", "T-acc")


@dataclass(frozen=True)
class GeneralizedExpressions:
    """Ground truth of N expressions.

    Attributes:
        ids: their "image" ids, one per expression.
        datasets: ``(N,)`` name of the data set each belongs to.
        targets: per expression float64 ``(t, 4)``, continuous XYXY, the objects meant; t may be 0.
    """

    ids: tuple[int, ...]
    datasets: np.ndarray
    targets: tuple[np.ndarray, ...]

    @property
    def num_targets(self) -> np.ndarray:
        """int64 ``(N,)``."""
        return np.array([len(boxes) for boxes in self.targets], dtype=np.int64)

    @property
    def dataset_names(self) -> list[str]:
        """Each name once, in file order."""
        return list(dict.fromkeys(self.datasets.tolist()))


def parse_generalized_expressions(content: Mapping[str, Any]) -> GeneralizedExpressions:
    """Ground truth of a file with one "image" per expression and one annotation per target.

    An expression without target has no annotation or, as in the published files, one that is
    marked by ``"empty": true`` or the category -1.

    Raises:
        ValueError: where the content is not such a file.
    """
    if not {"images", "annotations"} <= set(content):
        raise ValueError("A file of referring expressions needs 'images' and 'annotations'.")
    images = content["images"]
    if not images:
        raise ValueError("The file of referring expressions has no expression.")
    boxes: dict[int, list[Sequence[float]]] = {image["id"]: [] for image in images}
    if len(boxes) < len(images):
        raise ValueError("The 'images' of a file of referring expressions need different ids.")
    marked = set()
    for annotation in content["annotations"]:
        image_id = annotation["image_id"]
        if image_id not in boxes:
            raise ValueError(
                f"Annotation {annotation.get('id')} belongs to expression {image_id}, which is "
                "not among the 'images'."
            )
        if annotation.get("empty") or annotation.get("category_id") == -1:
            marked.add(image_id)
        else:
            boxes[image_id].append(annotation["bbox"])
    torn = [image_id for image_id in marked if boxes[image_id]]
    if torn:
        raise ValueError(
            f"Expression {torn[0]} is marked as one without target, but has a box as well."
        )
    return GeneralizedExpressions(
        ids=tuple(boxes),
        datasets=np.asarray([image.get("dataset_name", "grefexp") for image in images]),
        targets=tuple(xywh_corners(of_image) for of_image in boxes.values()),
    )


def answered_boxes(
    expressions: GeneralizedExpressions,
    records: Sequence[Record],
    *,
    score_thresh: float = 0.7,
    topk: int | None = None,
) -> list[np.ndarray | None]:
    """The boxes each expression is answered by.

    Args:
        records: ``{"image_id", "boxes" (n, 4) XYXY, "scores" (n,)}`` in any order, one per
            expression; of repeated ones the first counts, unknown ones do not.
        score_thresh: boxes of this score or above count.
        topk: the best so many of them; None for all.

    Returns:
        Per expression float32 ``(n, 4)``, best first; None where there is no record.
    """
    found = match_records(
        expressions.ids,
        records,
        consequence="each counts as wrong, even where it has no target",
    )
    return [None if r is None else _best_boxes(r, score_thresh, topk) for r in found]


def exactly_found(
    answers: Sequence[np.ndarray | None],
    targets: Sequence[np.ndarray],
    *,
    iou_thresh: float = 0.5,
    generalized: bool = False,
) -> np.ndarray:
    """Which answers are the targets, all of them and nothing else (F1 = 1).

    Boxes and targets are paired greedily, as in the published code: the pair of largest overlap
    first, then the largest among what is left. F1 is 1 if there are as many boxes as targets and
    each pair overlaps by ``iou_thresh``. Without target, it is 1 if nothing was answered.

    Args:
        answers: N arrays ``(n, 4)`` XYXY, or None, which is never right.
        targets: N arrays ``(t, 4)`` XYXY.
        iou_thresh: inclusive, above 0 and at most 1.
        generalized: measure by GIoU, as the published code does in place of the paper's IoU.

    Returns:
        bool ``(N,)``.
    """
    if not 0 < iou_thresh <= 1:
        raise ValueError(f"iou_thresh must be above 0 and at most 1, got {iou_thresh}.")
    answered = _counts(answers)
    same_count = answered == _counts(targets)
    found = same_count & (answered == 0)
    # All expressions of one count make one array: (E, n, 4) boxes and (E, n, 4) targets.
    for count in np.unique(answered[same_count & (answered > 0)]):
        members = np.flatnonzero(same_count & (answered == count))
        boxes = np.stack([answers[i] for i in members]).astype(np.float32)
        truth = np.stack([targets[i] for i in members]).astype(np.float32)
        overlap = box_overlap(
            np.repeat(boxes, count, axis=1).reshape(-1, 4),
            np.tile(truth, (1, count, 1)).reshape(-1, 4),
            generalized=generalized,
        ).reshape(-1, count, count)
        found[members] = _least_greedy_overlap(overlap) >= iou_thresh
    return found


def _least_greedy_overlap(overlap: np.ndarray) -> np.ndarray:
    """The smallest overlap of greedy pairs of ``n`` boxes and ``n`` targets.

    Args:
        overlap: ``(E, n, n)``, boxes in rows. Of equal pairs the one of the first box, then of
            the first target is taken.

    Returns:
        ``(E,)``.
    """
    overlap = overlap.copy()
    rows, count = np.arange(len(overlap)), overlap.shape[1]
    least = np.full(len(overlap), np.inf, dtype=overlap.dtype)
    for _ in range(count):
        box, target = np.divmod(overlap.reshape(len(overlap), -1).argmax(axis=1), count)
        least = np.minimum(least, overlap[rows, box, target])
        overlap[rows, box] = overlap[rows, :, target] = -np.inf
    return least


class GeneralizedRefExpEvaluator(ExpressionEvaluator):
    """Share of expressions, of any number of targets, that are answered by exactly these.

    Results, in percent: ``{"grefexp": {"Pr@F1", "Pr@F1_giou", "N-acc", "T-acc", "<data set>/Pr@F1",
    ...}}``:

    - Pr@F1: of all expressions, those answered by their targets and nothing else (F1 = 1 at
      IoU >= ``iou_thresh``); those without target by nothing. "_giou" measures by GIoU, as the
      published code does.
    - N-acc: of the expressions without target, those answered by nothing.
    - T-acc: of the expressions with targets, those answered by something.

    NaN where the file has no expression of the kind.

    Args:
        dataset_name: registered data set; its metadata give ``json_file``.
        json_file: the file of expressions, instead.
        score_thresh: boxes of this score or above are the answer. 0.7 is that of the published
            code; it belongs to the scores of its models, so choose one for yours on a validation
            split.
        topk: at most so many boxes per expression; None for no limit.
        iou_thresh: a box is on its target at this overlap (inclusive).
        output_dir: where to save ``grefexp_predictions.json``, if anywhere.
        distributed: gather the predictions of all processes.

    Raises:
        ValueError, FileNotFoundError: where ground truth is not named, not there, or not of the
            form of ``parse_generalized_expressions``.
    """

    file_name = "grefexp_predictions.json"
    empty_entry = "An expression that is answered by nothing has an entry too, with empty lists."
    parse = staticmethod(parse_generalized_expressions)

    def __init__(
        self,
        dataset_name: str | None = None,
        *,
        json_file: str | os.PathLike[str] | None = None,
        score_thresh: float = 0.7,
        topk: int | None = None,
        iou_thresh: float = 0.5,
        output_dir: str | os.PathLike[str] | None = None,
        distributed: bool = True,
    ) -> None:
        if topk is not None and topk < 1:
            raise ValueError(f"topk must be at least 1 (or None), got {topk}.")
        if not 0 < iou_thresh <= 1:
            raise ValueError(f"iou_thresh must be above 0 and at most 1, got {iou_thresh}.")
        super().__init__(dataset_name, json_file, output_dir, distributed)
        self._score_thresh = score_thresh
        self._topk = topk
        self._iou_thresh = iou_thresh

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Raises:
            ValueError: a prompt has no target. Nothing could be found by it, and an expression
                without target would be right whatever the model is.
        """
        for item in inputs:
            if not _asks(item.get("prompt")):
                raise ValueError(
                    f"Expression {item['image_id']} asks for nothing. Name its characters in "
                    "tokens_positive_eval of its 'image', for example [[[0, 9]]] for the whole of "
                    "a caption of 9 characters."
                )
        super().process(inputs, outputs)

    def score(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Results of saved predictions; see ``answered_boxes`` for their form."""
        truth = self.expressions
        answers = answered_boxes(truth, records, score_thresh=self._score_thresh, topk=self._topk)
        answered, num_targets = _counts(answers), truth.num_targets
        right = {
            f"Pr@F1{suffix}": exactly_found(
                answers, truth.targets, iou_thresh=self._iou_thresh, generalized=generalized
            )
            for suffix, generalized in (("", False), ("_giou", True))
        }
        right["N-acc"] = answered == 0
        right["T-acc"] = answered > 0
        concerned = {"N-acc": num_targets == 0, "T-acc": num_targets > 0}
        results: dict[str, float] = OrderedDict()
        for prefix, members in self.groups():
            for name in _METRICS:
                results[prefix + name] = _percent(right[name][members & concerned.get(name, True)])
        return OrderedDict(grefexp=results)

    def log(self, results: dict[str, dict[str, float]]) -> None:
        numbers = results["grefexp"]
        num_targets = self.expressions.num_targets
        rows = [
            [
                prefix.rstrip("/") or "all",
                *(
                    int((members & kind).sum())
                    for kind in (num_targets == 0, num_targets == 1, num_targets > 1)
                ),
                *(numbers[prefix + name] for name in _METRICS),
            ]
            for prefix, members in self.groups()
        ]
        table = tabulate(
            rows,
            headers=["in %", "no target", "one", "several", *_METRICS],
            floatfmt=".2f",
            tablefmt="pipe",
        )
        logger.info(
            "Referring expressions, boxes of score %g or more:\n%s", self._score_thresh, table
        )


def _best_boxes(record: Record, score_thresh: float, topk: int | None) -> np.ndarray:
    boxes, scores = arrays_of(record, np.float64)
    order = np.argsort(-scores, kind="stable")
    return boxes[order[scores[order] >= score_thresh][:topk]]


def _counts(groups: Sequence[np.ndarray | None]) -> np.ndarray:
    """How many boxes each group has, -1 where it is None."""
    return np.array([-1 if group is None else len(group) for group in groups], dtype=np.int64)


def _percent(right: np.ndarray) -> float:
    return 100 * float(right.mean()) if right.size else float("nan")


def _asks(prompt: Prompt | Sequence[Prompt] | None) -> bool:
    """Whether a target has tokens; True for None, which says nothing about it."""
    if prompt is None:
        return True
    prompts = [prompt] if isinstance(prompt, Prompt) else prompt
    return any(bool((part.positive_map > 0).any()) for part in prompts)
