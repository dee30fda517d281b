"""What is exported, before any exporter sees it, against the model."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from fiber_d2.export.deform_conv import deform_conv2d_by_grid_sample
from fiber_d2.export.parts import Graphs
from fiber_d2.layers import modulated_deform_conv2d


@pytest.fixture
def model(tiny):
    torch.manual_seed(5)
    model = instantiate(LazyConfig.load(str(tiny.config)).model).eval()
    for block in model.head.tower:
        torch.nn.init.normal_(block.offset.weight, std=0.3)
    return model


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 6)])
def test_deformable_convolution_by_grid_sample(size, stride):
    torch.manual_seed(0)
    height, width = ((side - 1) // stride + 1 for side in size)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    offset = 3 * torch.randn(2, 18, height, width, dtype=torch.float64)
    mask = torch.rand(2, 9, height, width, dtype=torch.float64)
    weight, bias = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    expected = modulated_deform_conv2d(x, offset, mask, weight, bias, stride=stride)
    found = deform_conv2d_by_grid_sample(x, offset, mask, weight, bias, stride=stride, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["operator", "grid_sample"])
def test_the_whole_and_the_parts_are_the_model(model, form):
    image = torch.rand(2, 3, 64, 96) * 255
    ids = torch.randint(5, 900, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    positive = torch.zeros(2, 3, 6)
    positive[:, 0, 1], positive[:, 1, 2:4], positive[:, 2, 3] = 1, 0.5, 1
    with torch.no_grad():
        features = model.backbone((image - model.pixel_mean) / model.pixel_std, ids, mask)
        head = model.head(features.pyramid, features.text, mask)
        graphs = Graphs(model, deform_conv=form)
        whole = graphs.whole()[0].module(image, ids, mask, positive)
        text, prefix, rest = (graph.module for graph in graphs.parts())
        parts = rest(*prefix(image), text(ids, mask), mask, positive)
    boxes, class_scores, centerness = whole
    scores = head.token_logits.sigmoid() @ positive.transpose(1, 2)
    torch.testing.assert_close(class_scores, scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(centerness, head.centerness.sigmoid(), rtol=1e-4, atol=1e-6)
    assert boxes.shape == (2, scores.shape[1], 4) and boxes.isfinite().all()
    for one, other in zip(parts, whole):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_form_that_is_not_known(model):
    with pytest.raises(ValueError, match="must be one of operator, grid_sample"):
        Graphs(model, deform_conv="magic")


def test_without_fused_blocks_there_are_no_parts(model):
    model.backbone.swin.fused_blocks = (0, 0, 0, 0)
    with pytest.raises(ValueError, match="no parts to export, only the whole"):
        Graphs(model).parts()
