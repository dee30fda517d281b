"""What there is to say about how a number was obtained: part of every file of results."""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import platform
from collections.abc import Mapping
from typing import Any

from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

import fiber_d2

_PLAIN = (bool, int, float, str)
# What evaluators hold besides their settings: where to write, how far they are, and what
# Detectron2's own classes keep for other tasks than boxes.
_NO_SETTINGS = {
    "distributed",
    "do_evaluation",
    "dataset_name",
    "output_dir",
    "rows",
    "tasks",
    "trim_at",
    "use_fast_impl",
}
_PACKAGES = (
    ("torch", "torch"),
    ("detectron2", "detectron2"),
    ("transformers", "transformers"),
    ("pycocotools", "pycocotools"),
    ("faster_coco_eval", "faster-coco-eval"),
)


def describe_evaluator(evaluator: DatasetEvaluator) -> dict[str, Any]:
    """Class, kind of metric, thresholds and limits of an evaluator, as JSON values.

    The kind of metric is the evaluator's ``metric_kind`` (a text), or else the first sentence of
    its documentation.
    """
    text = getattr(evaluator, "metric_kind", None)
    if text is None:
        text = " ".join((inspect.getdoc(type(evaluator)) or "").split("\n\n")[0].split())
    settings = plain_attributes(evaluator)
    if isinstance(evaluator, COCOEvaluator):
        # The parent's, which the scorer of this project does not read.
        settings.pop("max_dets_per_image", None)
    return {
        "evaluator": f"{type(evaluator).__module__}.{type(evaluator).__qualname__}",
        "metric": text,
        "settings": {key: x for key, x in settings.items() if key not in _NO_SETTINGS},
    }


def plain_attributes(value: Any) -> dict[str, Any]:
    """The numbers, names and switches that an object holds, and tuples and lists of them."""
    found = {}
    for name, item in vars(value).items():
        several = isinstance(item, (tuple, list)) and item
        if isinstance(item, _PLAIN) or (several and all(isinstance(x, _PLAIN) for x in item)):
            found[name.lstrip("_")] = list(item) if several else item
    return found


def library_versions() -> dict[str, str]:
    """Versions of what computes and counts, of those that are installed."""
    found = {"fiber_d2": fiber_d2.__version__, "python": platform.python_version()}
    for name, distribution in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def without_nan(value: Any) -> Any:
    """JSON knows no NaN: a category without ground truth has no score."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
