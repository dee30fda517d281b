"""Mixed precision against float32, on ordinarily initialised weights."""

import pytest
import torch

from fiber_d2.layers import LayerNorm, modulated_deform_conv2d
from fiber_d2.layers.compiled import is_compiled, why_not_compiled
from fiber_d2.layers.precision import LOW_PRECISION
from fiber_d2.modeling import dyhead
from fiber_d2.modeling.fpn import FeaturePyramid
from fiber_d2.structures import Prompt

DTYPES = [torch.bfloat16, torch.float16]


def inputs():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    ids = torch.randint(3, 50, (2, 9), generator=generator)
    return images, ids, torch.ones(2, 9, dtype=torch.bool)


def run(model, dtype=None):
    images, ids, mask = inputs()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        features = model.backbone(images, ids, mask)
        outputs = model.head(features.pyramid, features.text, mask)
        boxes = torch.tensor([[[5.0, 8.0, 50.0, 60.0]], [[10.0, 5.0, 90.0, 40.0]]])
        positive = torch.zeros(2, 1, 9, dtype=torch.bool)
        positive[:, :, 2] = True
        valid = torch.ones(2, 1, dtype=torch.bool)
        losses = model.head.losses(outputs, mask, boxes, valid, positive)
    return features, outputs, losses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query_norm", [False, True], ids=["v2", "v3"])
def test_autocast_stays_near_float32(build, dtype, query_norm):
    model = build(query_norm).train()
    features, outputs, losses = run(model)
    low_features, low_outputs, low_losses = run(model, dtype)
    # The unit of rounding: 8 or 11 bits.
    unit = torch.finfo(dtype).eps
    for a, b in zip(
        [*features.stages, *features.pyramid, features.text, outputs.token_logits],
        [*low_features.stages, *low_features.pyramid, low_features.text, low_outputs.token_logits],
    ):
        assert (a - b).abs().max() < 5 * unit * a.abs().max()
    for name in losses:
        torch.testing.assert_close(low_losses[name], losses[name], rtol=2 * unit, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_stays_in_float32(build, dtype):
    model = build()
    kept = []
    for name, module in model.named_modules():
        if isinstance(module, (LayerNorm, torch.nn.GroupNorm)):
            module.register_forward_hook(
                lambda m, x, out, name=name: kept.append((name, x[0].dtype, out.dtype))
            )
    _, outputs, losses = run(model, dtype)
    assert {found for _, _, found in kept} == {torch.float32}
    # The residual stream that enters a block's norms is not rounded between blocks.
    streams = [seen for name, seen, _ in kept if name.endswith(("blocks.1.norm1", "norm2"))]
    assert streams and set(streams) == {torch.float32}
    for tensor in (outputs.token_logits, outputs.box_deltas, outputs.centerness, *losses.values()):
        assert tensor.dtype == torch.float32


@pytest.mark.skipif(
    not is_compiled(), reason=f"compiled operators are missing: {why_not_compiled()}"
)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_deformable_convolutions_multiply_in_bfloat16_where_processors_do(
    build, monkeypatch, dtype, fast
):
    seen = set()

    def watch(x, offset, mask, weight, bias, **kwargs):
        out = modulated_deform_conv2d(x, offset, mask, weight, bias, **kwargs)
        assert offset.dtype == mask.dtype == out.dtype == torch.float32
        seen.update(value.dtype for value in (x, weight, bias))
        return out

    monkeypatch.setattr(dyhead, "is_bfloat16_fast", lambda: fast)
    monkeypatch.setattr(dyhead, "modulated_deform_conv2d", watch)
    run(build(), dtype)
    assert seen == {torch.bfloat16 if fast and dtype == torch.bfloat16 else torch.float32}


def test_evaluation_in_another_precision_is_that_of_autocast_around_it(build):
    model = build().eval()
    model.head.postprocessor.score_thresh = 0.0
    images, ids, mask = inputs()
    positive_map = torch.eye(9)[1:3]
    items = [
        {"image": image, "prompt": Prompt("", row, keep, positive_map, torch.arange(2))}
        for image, row, keep in zip(images * 40 + 120, ids, mask)
    ]
    plain = model(items)
    for name, dtype in LOW_PRECISION.items():
        with torch.autocast("cpu", dtype):
            expected = model(items)
        model.inference_precision = name
        found = model(items)
        model.inference_precision = None
        for ours, theirs, exact in zip(found, expected, plain):
            ours, theirs = ours["instances"], theirs["instances"]
            assert ours.scores.dtype == ours.pred_boxes.tensor.dtype == torch.float32
            assert torch.equal(ours.scores, theirs.scores)
            assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
            assert not torch.equal(ours.scores, exact["instances"].scores)
        assert not torch.is_autocast_enabled("cpu")


def test_the_precision_of_evaluation_is_not_that_of_training(build):
    model = build().train()
    expected = run(model)[2]
    model.inference_precision = "bfloat16"
    found = run(model)[2]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_under_autocast(build, dtype):
    model = build().train()
    sum(run(model)[2].values()).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # float16 gradients need loss scaling, as the training step does.
    scale = 1024.0 if dtype == torch.float16 else 1.0
    (sum(run(model, dtype)[2].values()) * scale).backward()
    largest = max(g.norm() for g in expected.values())
    for name, gradient in expected.items():
        found = dict(model.named_parameters())[name].grad / scale
        assert found.isfinite().all(), name
        difference = (found - gradient).norm()
        assert difference < 0.25 * (gradient.norm() + 1e-2 * largest), name


def test_one_pixel_maps_have_the_right_gradient_under_autocast():
    """Some releases of torch leave it uninitialised; ours must not depend on the release."""
    neck = FeaturePyramid(in_channels=(16, 16, 16), out_channels=16, drop_block=0.0)
    maps = [torch.randn(1, 16, size, size) for size in (4, 2, 1)]
    gradients = []
    for enabled in (False, True):
        for _ in range(3):  # memory that was used before
            neck.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                levels = neck(maps)
            assert levels[-1].shape[-2:] == (1, 1)
            sum(level.float().square().sum() for level in levels).backward()
        gradients.append(neck.p7.weight.grad.clone())
    # Only the kernel's centre meets the pixel.
    assert not gradients[1][..., 0, :].any() and not gradients[1][..., 2].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.1, atol=0.05)
