"""FIBER-B, built for a file and filled with its weights under the original's names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate

from fiber_d2.checkpoint import convert_fiber_state_dict, export_fiber_state_dict
from fiber_d2.modeling import FIBER

from .fixture import Fill, Fixture, FixtureError

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "common" / "models" / "fiber_b.py"
_STAGE = re.compile(r"fusion_backbone\.backbone\.body\.layers\.(\d+)\.")
_PATCHES = "fusion_backbone.backbone.body.patch_embed."


def frozen_stages(fixture: Fixture) -> int:
    """What the file's ``param_requires_grad`` says about the vision tower."""
    trained = dict(zip(fixture.get("param_names"), fixture.get("param_requires_grad")))
    if any(on for name, on in trained.items() if name.startswith(_PATCHES)):
        return -1
    stages: dict[int, bool] = {}
    for name, on in trained.items():
        match = _STAGE.match(name)
        if match:
            stages[int(match[1])] = stages.get(int(match[1]), False) or bool(on)
    frozen = next((stage for stage in sorted(stages) if stages[stage]), len(stages))
    return frozen + 1 if frozen else 0


def build_model(fixture: Fixture) -> FIBER:
    """The model of the file's variant, without dropout."""
    node = LazyConfig.load(str(CONFIG)).model
    node.backbone.vision.query_norm = fixture.variant == "v3"
    node.backbone.vision.frozen_stages = frozen_stages(fixture)
    node.backbone.vision.drop_path = 0.0
    node.backbone.text.dropout = 0.0
    node.backbone.neck.drop_block = 0.0
    return instantiate(node)


def fill_model(model: FIBER, fill: Fill) -> dict[str, torch.Tensor]:
    """Give every parameter its reference value, by the converter.

    Returns:
        entries of the original that the model has no place for (the unused class convolution).
    """
    filled, unused = {}, {}
    exported = export_fiber_state_dict(model.state_dict(), **anchor_arguments(model))
    for name, tensor in exported.items():
        values = fill.weights(name, tuple(tensor.shape))
        if values is None:
            filled[name] = tensor
            continue
        filled[name] = torch.from_numpy(values)
        if ".cls_logits." in name:
            unused[name] = filled[name]
    model.load_state_dict(convert_fiber_state_dict(filled))
    return unused


def check_names(model: FIBER, fixture: Fixture) -> None:
    """That the file is about a model with our parameters.

    Raises:
        FixtureError: names that one side lacks.
    """
    ours = set(export_fiber_state_dict(model.state_dict(), **anchor_arguments(model)))
    stored = {str(name) for name in fixture.get("param_names")}
    if not stored <= ours:
        raise FixtureError(
            f"{fixture.source} has parameters that FIBER-B {fixture.variant} lacks: "
            f"{', '.join(sorted(stored - ours)[:5])}."
        )


def anchor_arguments(model: FIBER) -> dict[str, tuple[float, ...]]:
    return {
        "anchor_strides": model.head.anchors.strides,
        "anchor_sizes": model.head.anchors.sizes,
    }
