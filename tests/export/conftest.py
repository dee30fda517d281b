"""Models to export, and what is the same answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate

from fiber_d2.engine.overrides import load_config
from fiber_d2.predictor import Classes, Expression

COLORS = ("red", "green", "blue", "yellow")
QUESTIONS = (
    # More than one caption holds.
    Classes([f"{color} {shape}" for shape in ("circle", "cross", "triangle") for color in COLORS]),
    "a red circle left of the blue cross",
    Expression("the green triangle"),
)


def awake(tiny, weights, *overrides):
    """As ``tiny``, with ``overrides`` of its configuration and nothing at rest: text reaches image
    tokens, deformable convolutions look around. ``weights`` is the file to write."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = instantiate(load_config(str(tiny.config), overrides).model)
        for name, weight in model.named_parameters():
            if name.endswith("alpha"):
                torch.nn.init.constant_(weight, 0.7)
            elif ".offset.weight" in name:
                torch.nn.init.normal_(weight, std=0.3)
        # Words far apart, so that what is asked for shows in the result.
        torch.nn.init.normal_(model.head.text_projection.weight)
    torch.save({"model": model.state_dict()}, weights)
    return SimpleNamespace(
        config=tiny.config, weights=weights, images=tiny.images, overrides=overrides
    )


def check_same(found, expected):
    """The same detections; boxes to a thousandth of a pixel."""
    assert len(found.instances) == len(expected.instances) > 0
    np.testing.assert_allclose(
        found.instances.pred_boxes.tensor, expected.instances.pred_boxes.tensor, atol=1e-3
    )
    np.testing.assert_allclose(found.instances.scores, expected.instances.scores, atol=1e-5)
    assert found.words == expected.words
    assert found.instances.image_size == expected.instances.image_size


@pytest.fixture
def libraries():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is of the extra `export`, part of `dev`")
