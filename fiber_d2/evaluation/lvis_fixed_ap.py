"""LVIS: AP with a fixed number of detections per class, and AP with one per image."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from tabulate import tabulate

from fiber_d2.data.categories import read_categories
from fiber_d2.data.coco_json import load_json
from fiber_d2.evaluation.curves import PrecisionCurves
from fiber_d2.evaluation.lvis_ap import IOU_THRESHOLDS, RECALL_LEVELS, average_precision
from fiber_d2.evaluation.lvis_data import (
    Detections,
    LVISDetections,
    LVISGroundTruth,
    parse_detections,
    parse_lvis,
    write_detections,
)
from fiber_d2.evaluation.records import gather_records

logger = logging.getLogger(__name__)

FIXED, STANDARD = "bbox", "bbox_per_image"
# Detections are first thrown out when there are this many, about 30 MB.
_FIRST_TRIM = 1_000_000

GroundTruth = Union[str, os.PathLike, Mapping[str, Any], LVISGroundTruth]
"""An LVIS file, or its content."""


def score_lvis(
    ground_truth: GroundTruth,
    detections: Detections | LVISDetections,
    *,
    topk_per_class: int = 10_000,
    max_dets_per_image: int = 300,
) -> dict[str, dict[str, float]]:
    """Both kinds of LVIS AP of saved detections, in 0..1.

    The order of the detections does not matter, but that of those of one image with equal scores.

    Args:
        ground_truth: LVIS file, or its content.
        detections: result file, or its content: ``{"image_id", "category_id", "bbox" (XYWH in
            pixels, continuous), "score"}``, ids of the ground truth.
        topk_per_class: FixedAP counts that many of a class, the best of all images.
        max_dets_per_image: ordinary AP counts that many of an image, the best of all classes.

    Returns:
        ``{"bbox": FixedAP, "bbox_per_image": ordinary AP}``, each with AP, AP50, AP75, APs/m/l
        (by area), APr/c/f (by frequency of the class), AR and ARs/m/l; NaN where undefined.

    Raises:
        FileNotFoundError, ValueError: what is named does not exist or is not of that form.
    """
    _check_limits(topk_per_class, max_dets_per_image)
    if isinstance(ground_truth, (str, os.PathLike)):
        source = os.fspath(ground_truth)
        content = load_json(source, None, ("images", "categories"))
        ground_truth = parse_lvis(content, source)
    elif not isinstance(ground_truth, LVISGroundTruth):
        ground_truth = parse_lvis(ground_truth)
    scored = _score(ground_truth, detections, topk_per_class, max_dets_per_image)
    return OrderedDict((kind, results) for kind, (results, _) in scored.items())


def _score(
    ground_truth: LVISGroundTruth,
    detections: Detections | LVISDetections,
    topk_per_class: int,
    max_dets_per_image: int,
) -> dict[str, tuple[dict[str, float], np.ndarray]]:
    """Results and precision ``(T, R, K)`` of each kind of AP; see :func:`score_lvis`."""
    if not ground_truth.annotated:
        raise ValueError("The ground truth has no annotations: nothing to score.")
    if not isinstance(detections, LVISDetections):
        detections = parse_detections(ground_truth, detections)
    subsets = [
        _best_of_class(detections, topk_per_class),
        _best_of_image(detections, max_dets_per_image),
    ]
    return dict(zip((FIXED, STANDARD), average_precision(ground_truth, detections, subsets)))


class LVISFixedAPEvaluator(DatasetEvaluator):
    """Box AP of LVIS, in both kinds that are published, out of one run.

    FixedAP, the headline, counts the best ``topk_per_class`` detections of each class over all
    images, however many an image has; ordinary AP counts the best ``max_dets_per_image`` of each
    image. Everything else is the same, see :mod:`fiber_d2.evaluation.lvis_ap`.

    Results, in percent: ``{"bbox": FixedAP, "bbox_per_image": ordinary AP}``, each with AP, AP50,
    AP75, APs/m/l, APr/c/f, AR and ARs/m/l. NaN where undefined. ``curves`` holds the precision at
    each recall of what was scored last. Nothing is scored where the json holds no annotations; the
    predictions are saved all the same.

    The predictions of an image come at once, all classes together; batches may have any size. An
    image that comes again, from this process or another, does not count again. Of equal scores at
    the limit of a class the lower image id counts, so that the order of images does not matter.

    Detections that neither kind can count are thrown out on the way: before that happens, at most
    a million are held, or twice ``topk_per_class * classes + max_dets_per_image * images``, of 28
    bytes each.

    Args:
        dataset_name: registered data set; its metadata give ``json_file`` and, if it has been
            read, ``thing_dataset_id_to_contiguous_id``.
        output_dir: where to save ``lvis_instances_results.json``, if anywhere. It holds what is
            needed to score again, see :func:`score_lvis`.
        topk_per_class: detections of a class that count for FixedAP.
        max_dets_per_image: detections of an image that count for ordinary AP.
        distributed: gather the predictions of all processes.

    Raises:
        FileNotFoundError, ValueError: where ground truth is not named, not there, or not LVIS's.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | os.PathLike[str] | None = None,
        topk_per_class: int = 10_000,
        max_dets_per_image: int = 300,
        distributed: bool = True,
    ) -> None:
        _check_limits(topk_per_class, max_dets_per_image)
        metadata = MetadataCatalog.get(dataset_name)
        json_file = metadata.get("json_file")
        if json_file is None:
            raise ValueError(
                f"LVIS evaluation needs json_file in the metadata of {dataset_name!r}."
            )
        content = load_json(json_file, dataset_name, ("images", "categories"))
        contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is None:
            contiguous = read_categories(content, json_file).contiguous
        self.ground_truth = parse_lvis(content, json_file)
        self._image_index = {i: index for index, i in enumerate(self.ground_truth.image_ids)}
        names = {c["id"]: c.get("name", f"class {c['id']}") for c in content["categories"]}
        self._names = [names[category_id] for category_id in self.ground_truth.category_ids]
        self.curves: dict[str, PrecisionCurves] = {}
        self._categories = _category_indices(self.ground_truth, contiguous)
        self._topk_per_class = topk_per_class
        self._max_dets_per_image = max_dets_per_image
        self._output_dir = output_dir
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        self._parts: list[LVISDetections] = []
        self._seen = np.zeros(len(self.ground_truth.image_ids), dtype=bool)
        self._rows, self._trim_at = 0, _FIRST_TRIM

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for item, output in zip(inputs, outputs):
            index = self._image_index.get(item["image_id"])
            if index is None:
                raise ValueError(
                    f"The image {item['image_id']!r} is not in the ground truth of this data set. "
                    "Do the images belong to another one?"
                )
            if not self._seen[index]:
                self._seen[index] = True
                self._add(index, output["instances"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Results on the main process, {} on the others."""
        self._trim()
        states = gather_records(
            [{"detections": self._parts[0], "seen": self._seen}], distributed=self._distributed
        )
        if states is None:
            return {}
        detections = self._kept(_merge(states))
        if self._output_dir is not None:
            path = Path(self._output_dir) / "lvis_instances_results.json"
            write_detections(self.ground_truth, detections, path)
        if not self.ground_truth.annotated:
            logger.info("The json of this data set has no annotations: nothing to score.")
            return {}
        _tell_of_few(self.ground_truth, detections, self._topk_per_class)
        results = self.score(detections)
        self._log_table(results)
        return results

    def score(self, detections: Detections | LVISDetections) -> dict[str, dict[str, float]]:
        """Results, in percent, of saved predictions; see :func:`score_lvis` for their form."""
        scored = _score(
            self.ground_truth, detections, self._topk_per_class, self._max_dets_per_image
        )
        self.curves = {
            kind: PrecisionCurves(self._names, IOU_THRESHOLDS, RECALL_LEVELS, precision)
            for kind, (_, precision) in scored.items()
        }
        return OrderedDict(
            (kind, OrderedDict((name, 100 * value) for name, value in metrics.items()))
            for kind, (metrics, _) in scored.items()
        )

    def score_file(self, path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
        """Results of saved predictions, a file as ``lvis_instances_results.json``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is of another form, or of another data set.
        """
        return self.score(path)

    def _add(self, image: int, instances: Instances) -> None:
        boxes = instances.pred_boxes.tensor.detach().cpu().float().numpy().copy()
        boxes[:, 2:] -= boxes[:, :2]
        classes = instances.pred_classes.detach().cpu().numpy()
        category = self._categories[np.clip(classes, 0, len(self._categories) - 1)]
        # Classes that the json does not have, as those of a model with more of them, are left out.
        category[(classes < 0) | (classes >= len(self._categories))] = -1
        known = category >= 0
        scores = instances.scores.detach().cpu().float().numpy()
        images = np.full(len(scores), image, dtype=np.int32)
        self._parts.append(LVISDetections(images, category, boxes, scores)[known])
        self._rows += int(known.sum())
        if self._rows > self._trim_at:
            self._trim()

    def _trim(self) -> None:
        """Throw out what cannot count any more; next when there is twice of what is left."""
        detections = self._kept(LVISDetections.concatenate(self._parts))
        self._parts, self._rows = [detections], len(detections)
        self._trim_at = max(_FIRST_TRIM, 2 * self._rows)

    def _kept(self, detections: LVISDetections) -> LVISDetections:
        return detections[
            _best_of_class(detections, self._topk_per_class)
            | _best_of_image(detections, self._max_dets_per_image)
        ]

    def _log_table(self, results: Mapping[str, Mapping[str, float]]) -> None:
        kinds = {
            FIXED: f"FixedAP ({self._topk_per_class} per class)",
            STANDARD: f"AP ({self._max_dets_per_image} per image)",
        }
        rows = [[text, *results[kind].values()] for kind, text in kinds.items()]
        headers = ["in %", *results[FIXED]]
        table = tabulate(rows, headers=headers, floatfmt=".2f", tablefmt="pipe")
        logger.info("LVIS boxes:\n%s", table)


def _check_limits(topk_per_class: int, max_dets_per_image: int) -> None:
    if topk_per_class < 1 or max_dets_per_image < 1:
        raise ValueError(
            "topk_per_class and max_dets_per_image must be positive, got "
            f"{topk_per_class} and {max_dets_per_image}."
        )


def _category_indices(truth: LVISGroundTruth, contiguous: Mapping[int, int]) -> np.ndarray:
    """int32: the ground truth's category of each contiguous class, -1 where there is none."""
    places = {category_id: place for place, category_id in enumerate(truth.category_ids)}
    indices = np.full(max(contiguous.values(), default=-1) + 1, -1, dtype=np.int32)
    for category_id, index in contiguous.items():
        indices[index] = places.get(category_id, -1)
    return indices


def _best_of_class(detections: LVISDetections, limit: int) -> np.ndarray:
    order = np.lexsort((detections.image, -detections.scores, detections.category))
    return _first_of_each(detections.category, order, limit)


def _best_of_image(detections: LVISDetections, limit: int) -> np.ndarray:
    return _first_of_each(
        detections.image, np.lexsort((-detections.scores, detections.image)), limit
    )


def _first_of_each(groups: np.ndarray, order: np.ndarray, limit: int) -> np.ndarray:
    """bool ``(N,)``: the first ``limit`` rows of each group, in ``order``, which sorts by group."""
    ordered = groups[order]
    ranks = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    chosen = np.zeros(len(ordered), dtype=bool)
    chosen[order] = ranks < limit
    return chosen


def _merge(states: list[dict[str, Any]]) -> LVISDetections:
    """The detections of all processes; of an image that several have seen, those of the first."""
    seen = np.zeros_like(states[0]["seen"])
    parts = []
    for state in states:
        detections = state["detections"]
        parts.append(detections[~seen[detections.image]])
        seen |= state["seen"]
    return LVISDetections.concatenate(parts)


def _tell_of_few(truth: LVISGroundTruth, detections: LVISDetections, topk: int) -> None:
    counts = np.bincount(detections.category, minlength=len(truth.category_ids))
    few = int((counts < topk).sum())
    if not len(detections):
        logger.warning(
            "Not a single box was predicted: AP is 0. Is the score threshold too high, or the "
            "model untrained?"
        )
    elif few:
        logger.info(
            "%d of %d classes have fewer than the %d detections that FixedAP counts, %d of them "
            "none. A lower score threshold or more boxes per image may raise it.",
            few,
            len(counts),
            topk,
            int((counts == 0).sum()),
        )
