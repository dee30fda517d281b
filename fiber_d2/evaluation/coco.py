"""Box AP in the COCO manner for classes that were found by their names."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from fiber_d2.evaluation.curves import PrecisionCurves, coco_curves
from fiber_d2.evaluation.records import Record, gather_records, keep_first
from fiber_d2.evaluation.saved import foreign_error, read_records, some_of
from fiber_d2.files import save_json

logger = logging.getLogger(__name__)

# Name of a metric: the IoU threshold it is taken at (None: mean over all) and the area range.
_METRICS = {
    "AP": (None, "all"),
    "AP50": (0.5, "all"),
    "AP75": (0.75, "all"),
    "APs": (None, "small"),
    "APm": (None, "medium"),
    "APl": (None, "large"),
}


def faster_coco_eval_available() -> bool:
    """Whether the compiled scorer, which gives the same numbers in less time, is installed."""
    return importlib.util.find_spec("faster_coco_eval") is not None


class GroundedCOCOEvaluator(COCOEvaluator):
    """Box AP of a data set with a COCO-format json.

    Differs from its parent where that serves detection by names: a class without ground truth has
    no place in the per-class table, a model that finds nothing has AP 0, an image that several
    processes report counts once, and the scorer is faster-coco-eval where that is installed (else
    pycocotools; the numbers are the same).

    Results, in percent: ``{"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-<class>"}}``.
    A metric without any ground truth (for example APl without large objects) is NaN. ``curves``
    holds the precision at each recall of what was scored last. Nothing is scored where the json
    holds no annotations; the predictions are saved all the same.

    Args:
        dataset_name: registered data set; its metadata give ``json_file`` and, where the json's
            category ids are not 0..K-1, ``thing_dataset_id_to_contiguous_id``.
        output_dir: where to save ``coco_instances_results.json``, if anywhere.
        legacy_boxes: read predicted corners as inclusive pixels (widths are ``x2 - x1 + 1``), as
            the original's result files do.
        max_dets_per_image: boxes of an image that count per class, best first.
        use_faster: True or False to choose the scorer; None for faster-coco-eval if installed.
        distributed: gather the predictions of all processes.

    Raises:
        FileNotFoundError: where the json is missing.
        ModuleNotFoundError: where faster-coco-eval is asked for and not installed.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | os.PathLike[str] | None = None,
        legacy_boxes: bool = False,
        max_dets_per_image: int = 100,
        use_faster: bool | None = None,
        distributed: bool = True,
    ) -> None:
        json_file = MetadataCatalog.get(dataset_name).get("json_file")
        if json_file is not None and not PathManager.isfile(json_file):
            raise FileNotFoundError(
                f"{json_file} is missing: it should hold the annotations of {dataset_name!r}. "
                "Put the data set there, or set DETECTRON2_DATASETS to the folder that has it."
            )
        super().__init__(
            dataset_name,
            tasks=("bbox",),
            distributed=distributed,
            output_dir=None if output_dir is None else os.fspath(output_dir),
            use_fast_impl=False,
        )
        if use_faster and not faster_coco_eval_available():
            raise ModuleNotFoundError(
                "use_faster=True needs faster-coco-eval: pip install faster-coco-eval"
            )
        self._faster = faster_coco_eval_available() if use_faster is None else use_faster
        self._legacy_boxes = legacy_boxes
        self._max_dets = max_dets_per_image
        self._json_ids = _json_category_ids(self._metadata, self._coco_api)
        self._predictions: list[Record] = []
        # Of what was scored last, by the name of its results.
        self.curves: dict[str, PrecisionCurves] = {}

    @property
    def ground_truth(self) -> list[Record]:
        """The annotations of the json."""
        return self._coco_api.dataset.get("annotations", [])

    @property
    def category_ids(self) -> list[int]:
        """The json's category ids, ascending."""
        return sorted(self._coco_api.getCatIds())

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for item, output in zip(inputs, outputs):
            instances = output["instances"].to(self._cpu_device)
            if self._legacy_boxes:
                corners = instances.pred_boxes.tensor.clone()
                corners[:, 2:] += 1
                instances.pred_boxes = Boxes(corners)
            detections = instances_to_coco_json(instances, item["image_id"])
            self._predictions.append(
                {"image_id": item["image_id"], "instances": self._in_json_ids(detections)}
            )

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Results on the main process, {} on the others.

        Args:
            img_ids: score these images only; None scores all images of the json.
        """
        predictions = gather_records(self._predictions, distributed=self._distributed)
        if predictions is None:
            return {}
        by_image, _ = keep_first(predictions, lambda prediction: prediction["image_id"])
        detections = [detection for image in by_image.values() for detection in image["instances"]]
        if self._output_dir:
            save_json(detections, Path(self._output_dir) / "coco_instances_results.json")
        if not self._do_evaluation:
            logger.info("The json of this data set has no annotations: nothing to score.")
            return {}
        results = self.score(detections, img_ids=img_ids)
        self._log(results)
        return results

    def score(
        self, detections: Sequence[Record], *, img_ids: Sequence[int] | None = None
    ) -> dict[str, dict[str, float]]:
        """Results of detections in COCO's result format.

        Args:
            detections: ``{"image_id", "category_id" (the json's), "bbox" (XYWH), "score"}``.

        Raises:
            ValueError: for a detection on an image that the json does not have.
        """
        evaluation = self._run_scorer(detections, img_ids)
        return OrderedDict(bbox={**overall_ap(evaluation), **self._class_ap(evaluation)})

    def score_file(self, path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
        """Results of saved predictions, a file as ``coco_instances_results.json``.

        Images without a box have no entry in such a file, so images that were left out cannot be
        told from those where nothing was found; a warning says how many there are.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is of another form, or of another data set.
        """
        detections = read_records(
            path,
            ("image_id", "category_id", "bbox", "score"),
            ("id", "area", "iscrowd", "segmentation"),
        )
        source, images = self._metadata.json_file, self._coco_api.getImgIds()
        predicted = dict.fromkeys(detection["image_id"] for detection in detections)
        known = set(images)
        foreign = [image_id for image_id in predicted if image_id not in known]
        if foreign:
            raise foreign_error(path, foreign, source)
        classes = {detection["category_id"] for detection in detections}
        unknown = classes.difference(self.category_ids)
        if unknown:
            raise ValueError(
                f"{path} holds predictions of another data set: {source} does not have the "
                f"category ids {some_of(sorted(unknown))}."
            )
        without = [image_id for image_id in images if image_id not in predicted]
        if without:
            logger.warning(
                "%s has no box on %d of %d images: %s",
                path,
                len(without),
                len(images),
                some_of(without),
            )
        return self.score(detections)

    def _class_ap(self, evaluation: Any) -> dict[str, float]:
        """``AP-<class>`` of the classes with ground truth, where there are several classes."""
        precision, params = evaluation.eval["precision"], evaluation.params
        categories = self._coco_api.loadCats(ids=params.catIds)
        if len(categories) < 2:
            return {}
        area = params.areaRngLbl.index("all")
        values = {
            f"AP-{category['name']}": _mean_percent(precision[:, :, place, area, -1])
            for place, category in enumerate(categories)
        }
        return {name: value for name, value in values.items() if np.isfinite(value)}

    def _log(self, results: dict[str, dict[str, float]]) -> None:
        _log_tables(results["bbox"])

    def _run_scorer(self, detections: Sequence[Record], img_ids: Sequence[int] | None) -> Any:
        """A COCOeval that has accumulated; arguments as of ``score``."""
        unknown = {d["image_id"] for d in detections} - set(self._coco_api.getImgIds())
        if unknown:
            raise ValueError(
                f"{len(unknown)} predicted images are not in {self._metadata.json_file}, for "
                f"example image_id {min(unknown)}."
            )
        if not detections:
            logger.warning(
                "Not a single box was predicted: AP is 0. Is the score threshold too high, or the "
                "model untrained?"
            )
        if self._faster:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval
        else:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        dataset = self._coco_api.dataset
        # Scorers write into what they are given, and read two fields that hand-made files lack.
        # New ids, since pycocotools takes a match with the box of id 0 for none.
        truth = [
            {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a, "id": i}
            for i, a in enumerate(self.ground_truth, start=1)
        ]
        found = [
            {**d, "id": i, "iscrowd": 0, "area": d["bbox"][2] * d["bbox"][3]}
            for i, d in enumerate(detections, start=1)
        ]
        # The scorers report to stdout; what matters of it is logged by evaluate().
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(
                _index(COCO, dataset, truth), _index(COCO, dataset, found), "bbox"
            )
            evaluation.params.maxDets = [self._max_dets]
            if img_ids is not None:
                evaluation.params.imgIds = list(img_ids)
            evaluation.evaluate()
            evaluation.accumulate()
        names = [c["name"] for c in self._coco_api.loadCats(ids=evaluation.params.catIds)]
        self.curves = {"bbox": coco_curves(evaluation, names)}
        return evaluation

    def _in_json_ids(self, detections: list[Record]) -> list[Record]:
        """The same detections under the json's category ids, without those of unknown classes."""
        return [
            {**detection, "category_id": self._json_ids[detection["category_id"]]}
            for detection in detections
            if detection["category_id"] in self._json_ids
        ]


def overall_ap(evaluation: Any, category_ids: Collection[int] | None = None) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm and APl in percent, NaN where there is no ground truth.

    Args:
        evaluation: a COCOeval after ``accumulate``.
        category_ids: the json's ids of the classes to average over; None for all.
    """
    precision, params = evaluation.eval["precision"], evaluation.params
    if category_ids is not None:
        precision = precision[:, :, np.isin(params.catIds, list(category_ids))]
    results = {}
    for name, (iou, area) in _METRICS.items():
        thresholds = slice(None) if iou is None else np.isclose(params.iouThrs, iou)
        results[name] = _mean_percent(
            precision[thresholds, :, :, params.areaRngLbl.index(area), -1]
        )
    return results


def _json_category_ids(metadata: Any, coco_api: Any) -> dict[int, int]:
    """Contiguous class id to the json's category id."""
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    if contiguous is None:
        return {category_id: category_id for category_id in coco_api.getCatIds()}
    return {index: category_id for category_id, index in contiguous.items()}


def _index(coco_class: type, dataset: dict[str, Any], annotations: list[Record]) -> Any:
    api = coco_class()
    api.dataset = {
        "info": {},
        "images": copy.copy(dataset["images"]),
        "categories": copy.copy(dataset["categories"]),
        "annotations": annotations,
    }
    api.createIndex()
    return api


def _mean_percent(precision: np.ndarray) -> float:
    """Mean of what is defined (scorers mark the rest by -1); NaN where nothing is."""
    defined = precision[precision > -1]
    return 100 * float(defined.mean()) if defined.size else float("nan")


def _log_tables(results: dict[str, float]) -> None:
    overall = [(name, results[name]) for name in _METRICS]
    per_class = [(name[3:], value) for name, value in results.items() if name.startswith("AP-")]
    table = tabulate(
        [[value for _, value in overall]],
        headers=[name for name, _ in overall],
        floatfmt=".2f",
        tablefmt="pipe",
    )
    logger.info("Boxes:\n%s", table)
    if per_class:
        columns = min(4, len(per_class))
        rows = [sum(per_class[i : i + columns], ()) for i in range(0, len(per_class), columns)]
        table = tabulate(rows, headers=["class", "AP"] * columns, floatfmt=".2f", tablefmt="pipe")
        logger.info("Boxes per class (classes without ground truth are left out):\n%s", table)
