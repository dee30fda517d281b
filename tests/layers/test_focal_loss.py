"""Focal loss of anchors against the words of their boxes: compiled, in pieces, and a loop."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from fiber_d2.layers import assigned_token_focal_loss
from fiber_d2.layers import focal_loss as module
from fiber_d2.layers.compiled import is_compiled, why_not_compiled

compiled = pytest.mark.skipif(
    not is_compiled(), reason=f"compiled operators are missing: {why_not_compiled()}"
)
OPTIONS = {"alpha": 0.25, "gamma": 2.0, "no_object_column": None}


def draw_inputs(batch, anchors, boxes, tokens, dtype=torch.float64, soft=False):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(batch, anchors, tokens, generator=generator, dtype=torch.float64)
    assigned = torch.randint(-1, boxes, (batch, anchors), generator=generator)
    weights = torch.rand(batch, boxes, tokens, generator=generator, dtype=torch.float64)
    # Padding at the end, as captions have it, and one hole.
    mask = torch.rand(batch, tokens, generator=generator) > 0.1
    mask[:, tokens - tokens // 3 :] = False
    mask[:1] = True
    return logits.to(dtype), assigned, weights if soft else weights > 0.7, mask


def loop(logits, assigned, positive_map, mask, *, alpha, gamma, no_object_column):
    """The definition, anchor by anchor, in double precision."""
    total = logits.new_zeros((), dtype=torch.float64)
    for image in range(logits.shape[0]):
        for anchor, box in enumerate(assigned[image].tolist()):
            target = torch.zeros(logits.shape[2], dtype=torch.float64)
            if box >= 0:
                target = positive_map[image, box].double()
            elif no_object_column is not None and no_object_column < len(target):
                target[no_object_column] = 1
            loss = sigmoid_focal_loss(
                logits[image, anchor].double(), target, alpha=alpha, gamma=gamma
            )
            total = total + loss[mask[image]].sum()
    return total


def in_pieces(logits, assigned, positive_map, mask, **options):
    """What runs where nothing was compiled; a few anchors at a time even of these few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "is_compiled", lambda: False)
        patch.setattr(module, "PIECE_ON_CPU", 4 * logits.shape[0] * logits.shape[2])
        return assigned_token_focal_loss(logits, assigned, positive_map, mask, **options)


def run(function, inputs, options):
    logits = inputs[0].detach().clone().requires_grad_()
    loss = function(logits, *inputs[1:], **options)
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    return loss.detach(), gradient


PATHS = [in_pieces, pytest.param(assigned_token_focal_loss, marks=compiled)]


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ((2, 70, 3, 16), {}),
        ((3, 5, 4, 37), {"no_object_column": 36, "alpha": 0.4}),
        ((1, 1, 1, 1), {}),
        ((2, 9, 2, 20), {"gamma": 1.5, "no_object_column": 20}),
        ((2, 9, 2, 20), {"gamma": 0.0, "no_object_column": 3}),
        ((2, 6, 0, 5), {"no_object_column": 4}),
        ((2, 0, 3, 5), {}),
        ((0, 4, 3, 5), {}),
        ((2, 4, 3, 0), {}),
    ],
)
def test_agrees_with_a_loop_over_anchors(function, soft, shape, change):
    inputs, options = draw_inputs(*shape, soft=soft), {**OPTIONS, **change}
    loss, gradient = run(function, inputs, options)
    expected = run(loop, inputs, options) if inputs[0].numel() else (loss.new_zeros(()), inputs[0])
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_exact_as_the_formats_allow(dtype):
    inputs = draw_inputs(2, 130, 5, 45, dtype=dtype)
    options = {**OPTIONS, "no_object_column": 44}
    loss, gradient = run(assigned_token_focal_loss, inputs, options)
    exact = run(loop, (inputs[0].double(), *inputs[1:]), options)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0)
    # Halves round once, at the end; single precision keeps small slopes as exact as large ones.
    small = 2.0**-24 if dtype == torch.float16 else 1e-30
    torch.testing.assert_close(
        gradient.double(), exact[1], rtol=max(2e-6, torch.finfo(dtype).eps), atol=small
    )


@compiled
def test_every_logit_is_as_exact_as_large_ones():
    """Values of the fast exponential and logarithm, one by one, from underflow to the largest."""
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-5e4, -88.0, 0.0, 88.0, 5e4])])
    for positive in (False, True):
        inputs = (
            x.view(1, -1, 1),
            torch.full((1, len(x)), 0 if positive else -1),
            torch.ones(1, 1, 1, dtype=torch.bool),
            torch.ones(1, 1, dtype=torch.bool),
        )
        _, slopes = run(assigned_token_focal_loss, inputs, OPTIONS)
        wide = inputs[0].double().requires_grad_()
        target = torch.full_like(wide, float(positive))
        exact = 3 * sigmoid_focal_loss(wide, target, alpha=0.25, gamma=2.0, reduction="sum")
        (exact,) = torch.autograd.grad(exact, wide)
        assert slopes.isfinite().all()
        torch.testing.assert_close(slopes.double(), exact, rtol=3e-6, atol=1e-25)


@pytest.mark.parametrize("function", PATHS)
def test_gradients_are_those_of_finite_differences(function):
    logits, *rest = draw_inputs(2, 3, 2, 5, soft=True)
    for gamma in (2.0, 1.3):
        assert torch.autograd.gradcheck(
            lambda x, gamma=gamma: function(x, *rest, gamma=gamma), logits.div(4).requires_grad_()
        )


@pytest.mark.parametrize("function", PATHS)
def test_one_tensor_of_the_logits_size_is_kept_for_the_backward_pass(function):
    logits, *rest = draw_inputs(2, 200, 3, 16, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function(logits.requires_grad_(), *rest)
    # Those of a piece of the anchors are gone with it.
    sizes = [x.numel() for x in kept if x.shape[1:2] == (200,)]
    assert logits.numel() <= sum(sizes) < 1.2 * logits.numel()


@compiled
@pytest.mark.parametrize("batch", [0, 2])
def test_torch_knows_shapes_gradients_and_fakes_of_it(batch):
    for dtype in (torch.float32, torch.bfloat16):
        logits, *rest = (value[:batch] for value in draw_inputs(2, 5, 3, 7, dtype=dtype))
        arguments = (logits.requires_grad_(), *rest, 6, 0.25, 2.0)
        torch.library.opcheck(torch.ops.fiber_d2.token_focal_loss.default, arguments)


@compiled
def test_repeats_to_the_last_bit_whatever_the_threads():
    inputs = draw_inputs(3, 333, 4, 29, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(assigned_token_focal_loss, inputs, OPTIONS))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@compiled
def test_reads_views():
    logits, assigned, positive_map, mask = draw_inputs(2, 12, 3, 10, dtype=torch.float32)
    expected = run(assigned_token_focal_loss, (logits, assigned, positive_map, mask), OPTIONS)
    views = [
        logits.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([logits, logits], dim=2)[..., :10],
        torch.cat([logits, logits], dim=1)[:, :12],
        logits.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    spread = [value.repeat_interleave(2, dim=-1)[..., ::2] for value in (assigned, positive_map)]
    for view in views:
        for rest in ((assigned, positive_map, mask), (*spread, mask)):
            loss = assigned_token_focal_loss(leaf := view.requires_grad_(), *rest)
            (gradient,) = torch.autograd.grad(3 * loss, leaf)
            assert torch.equal(loss.detach(), expected[0])
            assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("function", PATHS)
def test_numbers_that_are_none_stay_visible(function):
    logits, *rest = draw_inputs(1, 4, 3, 9, dtype=torch.float32)
    logits[0, 2, 5] = float("nan")
    loss, gradient = run(function, (logits, *rest), OPTIONS)
    assert loss.isnan() and gradient[0, 2, 5].isnan() and gradient.isnan().sum() == 1


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, a, p, m: (x, a + 3, p, m), "outside -1 to 2"),
        (lambda x, a, p, m: (x, a - 1, p, m), "outside -1 to 2"),
        (lambda x, a, p, m: (x, a[:, :3], p, m), "do not fit logits"),
        (lambda x, a, p, m: (x, a, p[..., :4], m), "do not fit logits"),
        (lambda x, a, p, m: (x, a.int(), p, m), "assigned is int64"),
        (lambda x, a, p, m: (x[0], a, p, m), "needs logits"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        assigned_token_focal_loss(*change(*draw_inputs(2, 40, 3, 9)))


@compiled
def test_builds_nothing_of_the_logits_size():
    inputs = draw_inputs(2, 400, 5, 64, dtype=torch.float32)
    logits = inputs[0].requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = assigned_token_focal_loss(logits, *inputs[1:])
        torch.autograd.grad(loss, logits)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    size = logits.numel() * logits.element_size()
    # The gradient itself, and rows of the map.
    assert size <= taken < 1.25 * size
