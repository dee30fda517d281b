"""Test-time augmentation: merging the views' boxes, and the sizes a scale is trusted with

SPEC_DATA_EVAL section 7, ``k_tta.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fiber_d2.modeling.merging import in_size_range, merge_detections

from .common import Section, read_json

TOLERANCE = 1e-5
# The original averages in float32, whose steps are 6e-5 beyond 512 pixels.
PIXEL_TOLERANCE = 5e-4
# The original has a name of its own for plain suppression.
METHODS = {"none": "nms"}


def check(directory: Path) -> Section:
    section = Section("k")
    content = read_json(directory, "k_tta.json")
    parts = {"merge": _check_merging, "scale_range_filter": _check_range}
    for name, check_part in parts.items():
        for number, case in enumerate(content[name]):
            with section.case(f"{name}[{number}]"):
                check_part(section, case)
    return section


def _check_merging(section: Section, case: dict[str, Any]) -> None:
    labels = torch.tensor(case["labels"], dtype=torch.int64)
    # The original merges the classes it is told, in that order.
    merged = torch.tensor(case["select_classes"] or range(1, case["num_classes"]))
    row, place = (labels[:, None] == merged).nonzero(as_tuple=True)
    boxes, scores, places = merge_detections(
        _boxes(case["boxes"])[row],
        torch.tensor(case["scores"], dtype=torch.float32)[row],
        place,
        method=METHODS.get(case["special_nms"], case["special_nms"]),
        threshold=case["thresh"],
        max_detections=case["pre_nms_top_n"],
        soft_vote_min_score=case["soft_vote_min_score"],
    )
    expected = case["expected"]
    section.equal("labels", merged[places], expected["labels"])
    section.close("scores", scores, expected["scores"], TOLERANCE)
    section.close("boxes", boxes, _boxes(expected["boxes"]), PIXEL_TOLERANCE)


def _check_range(section: Section, case: dict[str, Any]) -> None:
    inside = in_size_range(_boxes(case["boxes"]), case["range"])
    section.equal("kept", inside.nonzero().flatten(), case["kept"])


def _boxes(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 4)
