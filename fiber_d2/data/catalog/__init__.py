"""The table of the built-in data sets: what the original trains and tests on, and where it lies."""

from __future__ import annotations

from .detection import COCO_SETS, LVIS_SETS, OBJECTS365_SETS
from .entry import DETECTION, GROUNDING, REFEXP, BuiltinDataset
from .grounding import FLICKR30K_SETS, MIXED_SETS, REFCOCO_SETS
from .odinw import ODINW13, ODINW35, ODINW_SETS
from .shapes import SHAPES_SETS

__all__ = [
    "BUILTIN",
    "DETECTION",
    "GROUNDING",
    "ODINW13",
    "ODINW35",
    "REFEXP",
    "BuiltinDataset",
]

BUILTIN: dict[str, BuiltinDataset] = {
    **SHAPES_SETS,
    **COCO_SETS,
    **LVIS_SETS,
    **OBJECTS365_SETS,
    **FLICKR30K_SETS,
    **MIXED_SETS,
    **REFCOCO_SETS,
    **ODINW_SETS,
}
