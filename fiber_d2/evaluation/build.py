"""From a data set's ``evaluator_type`` to its evaluator."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from fiber_d2.data.records import check_registered
from fiber_d2.evaluation.coco import GroundedCOCOEvaluator
from fiber_d2.evaluation.description import DescriptionEvaluator
from fiber_d2.evaluation.flickr import FlickrRecallEvaluator
from fiber_d2.evaluation.generalized_refexp import GeneralizedRefExpEvaluator
from fiber_d2.evaluation.lvis_fixed_ap import LVISFixedAPEvaluator
from fiber_d2.evaluation.refexp import RefExpEvaluator

# Called as evaluator(dataset_name, output_dir=..., **options).
EVALUATORS: dict[str, Callable[..., DatasetEvaluator]] = {
    "coco": GroundedCOCOEvaluator,
    "description": DescriptionEvaluator,
    "flickr": FlickrRecallEvaluator,
    "grefexp": GeneralizedRefExpEvaluator,
    "lvis": LVISFixedAPEvaluator,
    "refexp": RefExpEvaluator,
}


def build_evaluator(
    dataset_name: str, output_dir: str | os.PathLike[str] | None = None, **options: Any
) -> DatasetEvaluator:
    """The evaluator of a registered data set.

    Args:
        dataset_name: its name; ``evaluator_type`` in its metadata chooses the evaluator.
        output_dir: predictions are saved in ``<output_dir>/<dataset_name>``; None saves nothing.
        options: further arguments of the evaluator, such as ``legacy_boxes=True`` or
            ``distributed=False``.

    Raises:
        KeyError: where the data set is not registered.
        ValueError: where no evaluator goes by its ``evaluator_type``, or it takes no such options.
    """
    check_registered(dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        raise ValueError(
            f"Data set {dataset_name!r} has evaluator_type {kind!r}, which no evaluator serves. "
            f"Set evaluator_type in its metadata to one of: {', '.join(sorted(EVALUATORS))}."
        )
    folder = None if output_dir is None else Path(output_dir) / dataset_name
    parameters = inspect.signature(EVALUATORS[kind]).parameters
    known = [name for name in parameters if name not in ("dataset_name", "output_dir")]
    for name in options:
        if name not in known:
            raise ValueError(
                f"The evaluator of {dataset_name!r} has no option {name!r}; it has: "
                f"{', '.join(known)}."
            )
    try:
        return EVALUATORS[kind](dataset_name, output_dir=folder, **options)
    except TypeError as error:
        raise ValueError(
            f"The evaluator of {dataset_name!r} takes no such options: {error}."
        ) from error
