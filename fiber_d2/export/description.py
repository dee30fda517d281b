"""``export.json``: what one has to know of the files beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import transforms as T

import fiber_d2
from fiber_d2.data.transforms import ResizeShortestEdgeTruncated
from fiber_d2.modeling import FIBER
from fiber_d2.predictor_settings import Settings

FILE = "export.json"
VERSION = 1
_RESIZES = {cls.__name__: cls for cls in (T.ResizeShortestEdge, ResizeShortestEdgeTruncated)}
_LIMITS = (
    "score_thresh",
    "pre_nms_topk",
    "nms_thresh",
    "max_detections",
    "max_merged_detections",
)


def describe(model: FIBER, settings: Settings) -> dict[str, Any]:
    """Plain values that :class:`~fiber_d2.export.ExportedPredictor` needs.

    Raises:
        ValueError: images are prepared in a way that the file has no words for.
    """
    return {
        "version": VERSION,
        "fiber_d2": fiber_d2.__version__,
        "torch": torch.__version__,
        "tokenizer": settings.tokenizer,
        "prompts": settings.prompts,
        "image_format": settings.image_format,
        "resize": _describe_resize(settings.augmentations),
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "multiple_of": model.backbone.size_divisibility,
        "pad_token_id": model.backbone.text.pad_token_id,
        "max_tokens": model.backbone.text.max_tokens,
        "strides": list(model.head.anchors.strides),
        "limits": {name: getattr(model.head.postprocessor, name) for name in _LIMITS},
    }


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError: the folder holds no exported model.
        ValueError: it does, but one that this version cannot read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{os.fspath(folder)} is no exported model, it has no {FILE}: `fiber-d2 export` "
            "writes such folders."
        )
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is no json: {error}") from error
    if not isinstance(known, dict) or known.get("version") != VERSION:
        raise ValueError(
            f"{path} was written by another version of fiber_d2: export the model again."
        )
    return known


def _describe_resize(augmentations: Sequence[Any]) -> dict[str, Any] | None:
    if not augmentations:
        return None
    one = augmentations[0]
    known = type(one).__name__ in _RESIZES and len(augmentations) == 1
    if not known or len(set(one.short_edge_length)) != 1:
        raise ValueError(
            f"Images are prepared by {list(augmentations)}, but an export can describe a single "
            f"{' or '.join(_RESIZES)} with one length: change the test set of the configuration "
            "(dataloader.test.augmentations)."
        )
    return {
        "kind": type(one).__name__,
        "short_edge_length": int(one.short_edge_length[0]),
        "max_size": int(one.max_size),
    }


def build_resize(known: dict[str, Any] | None) -> list[T.Augmentation]:
    """The augmentations that ``resize`` of the description means."""
    if known is None:
        return []
    return [_RESIZES[known["kind"]](known["short_edge_length"], known["max_size"])]
