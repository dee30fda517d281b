"""From a data set's ``evaluator_type`` to its evaluator."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from fiber_d2.data.records import check_registered
from fiber_d2.evaluation.coco import GroundedCOCOEvaluator
from fiber_d2.evaluation.flickr import FlickrRecallEvaluator
from fiber_d2.evaluation.refexp import RefExpEvaluator

# Called as evaluator(dataset_name, output_dir=...).
EVALUATORS: dict[str, Callable[..., DatasetEvaluator]] = {
    "coco": GroundedCOCOEvaluator,
    "flickr": FlickrRecallEvaluator,
    "refexp": RefExpEvaluator,
}


def build_evaluator(
    dataset_name: str, output_dir: str | os.PathLike[str] | None = None
) -> DatasetEvaluator:
    """The evaluator of a registered data set.

    Args:
        dataset_name: its name; ``evaluator_type`` in its metadata chooses the evaluator.
        output_dir: predictions are saved in ``<output_dir>/<dataset_name>``; None saves nothing.

    Raises:
        KeyError: where the data set is not registered.
        ValueError: where no evaluator goes by its ``evaluator_type``.
    """
    check_registered(dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise ValueError(
            f"Data set {dataset_name!r} has evaluator_type {kind!r}, which no evaluator serves. "
            f"Set evaluator_type in its metadata to one of: {', '.join(sorted(EVALUATORS))}."
        )
    folder = None if output_dir is None else Path(output_dir) / dataset_name
    return EVALUATORS[kind](dataset_name, output_dir=folder)
