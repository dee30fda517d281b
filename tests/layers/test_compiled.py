"""The compiled operators against torchvision's, and life without them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.ops import deform_conv2d

from fiber_d2.layers import compiled as compiled_operators
from fiber_d2.layers import flat_offset_view, modulated_deform_conv2d
from fiber_d2.layers.compiled import is_compiled, why_not_compiled
from fiber_d2.layers.deform_conv import _deform_conv2d_embedding_bag

REPOSITORY = Path(__file__).parents[2]

compiled = pytest.mark.skipif(
    not is_compiled(), reason=f"compiled operators are missing: {why_not_compiled()}"
)


def draw_inputs(batch, channels, height, width, out_channels, stride, spread, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    out = [(size + 2 - 3) // stride + 1 for size in (height, width)]
    return (
        draw(batch, channels, height, width),
        draw(batch, 18, *out) * spread,
        draw(batch, 9, *out).sigmoid(),
        draw(out_channels, channels, 3, 3),
        draw(out_channels),
    )


def run(function, inputs, stride):
    """Output and gradients of ``function`` under one fixed gradient of the output."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = function(*leaves, stride)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def operator(x, offset, mask, weight, bias, stride):
    return torch.ops.fiber_d2.deform_conv2d(x, offset, mask, weight, bias, stride, 1)


def torchvision_operator(x, offset, mask, weight, bias, stride):
    return deform_conv2d(x, offset, weight, bias, stride, 1, mask=mask)


CASES = [
    # batch, channels, height, width, out_channels, stride, spread of offsets
    (2, 4, 7, 9, 6, 1, 1.5),
    (1, 1, 1, 1, 1, 1, 2.0),
    (2, 5, 8, 5, 3, 2, 1.5),
    # Most points far off the map.
    (2, 4, 6, 6, 6, 2, 40.0),
    # Several tiles of an image, channels that fill no vector.
    (3, 33, 41, 37, 7, 1, 3.0),
]


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torchvision(case, threads):
    inputs, stride = draw_inputs(*case), case[5]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(operator, inputs, stride)
        again = run(operator, inputs, stride)
    finally:
        torch.set_num_threads(before)
    for ours, repeated, theirs in zip(found, again, run(torchvision_operator, inputs, stride)):
        torch.testing.assert_close(ours, theirs)
        # Resuming is exact only if a step is.
        assert torch.equal(ours, repeated)


@compiled
def test_single_precision_is_as_exact_as_that_of_torch():
    case = (2, 32, 20, 24, 16, 1, 2.0)
    exact = run(torchvision_operator, draw_inputs(*case), 1)
    inputs = draw_inputs(*case, dtype=torch.float32)
    ours = run(operator, inputs, 1)
    theirs = run(torchvision_operator, inputs, 1)
    for found, other, truth in zip(ours, theirs, exact):
        error = (found - truth).abs().max()
        assert error <= 2 * (other - truth).abs().max() + 1e-5 * truth.abs().max()


@compiled
def test_products_are_those_of_torch_without_onednn():
    inputs = draw_inputs(2, 33, 23, 21, 12, 1, 3.0, dtype=torch.float32)
    found = run(operator, inputs, 1)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = run(operator, inputs, 1)
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@compiled
def test_gradients_are_those_of_finite_differences():
    inputs = [value.requires_grad_() for value in draw_inputs(1, 2, 4, 3, 2, 1, 0.4)]
    assert torch.autograd.gradcheck(lambda *leaves: operator(*leaves, 1), inputs)


@compiled
def test_reads_views_without_copies_of_its_own_making():
    """Offsets and masks as the dynamic head hands them over: parts of one map, read flat."""
    x, _, _, weight, bias = draw_inputs(2, 4, 5, 6, 3, 1, 1.0)
    both = torch.randn(2, 27, 10, 12, dtype=torch.float64)
    offset, mask = both.split([18, 9], dim=1)
    offset, mask = flat_offset_view(offset, 5, 6), flat_offset_view(mask, 5, 6)
    assert not offset.is_contiguous() and not mask.is_contiguous()
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [x.to(memory_format=layout), offset, mask, weight, bias]
        found = operator(*inputs, 1)
        plain = operator(*(value.contiguous() for value in inputs), 1)
        assert torch.equal(found, plain)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(operator(transposed, offset, mask, weight, bias, 1), plain)


def in_bfloat16(x, offset, mask, weight, bias):
    """As the operator takes them: where and how much to sample stays float32."""
    return x.bfloat16(), offset.float(), mask.float(), weight.bfloat16(), bias.bfloat16()


@compiled
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_rounds_samples_and_sums_alone(case, onednn):
    stride = case[5]
    inputs = in_bfloat16(*draw_inputs(*case))
    with torch.backends.mkldnn.flags(enabled=onednn):
        found = operator(*inputs, stride)
    assert found.dtype == torch.float32
    doubles = [value.double() for value in inputs]
    exact = torchvision_operator(*doubles, stride)
    # A sample is off by 2^-9 of itself at most, a sum by as much again.
    x, offset, mask, weight, bias = doubles
    largest = torchvision_operator(x.abs(), offset, mask, weight.abs(), bias.abs(), stride)
    assert ((found - exact).abs() <= 2.0**-8 * largest + 1e-6).all()
    assert (found - exact).abs().max() > 0


@compiled
def test_bfloat16_without_offsets_is_a_convolution_to_the_last_sum():
    x, offset, mask, weight, bias = in_bfloat16(*draw_inputs(1, 40, 9, 7, 5, 1, 0.0))
    found = operator(x, offset, torch.ones_like(mask), weight, bias, 1)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    # Samples are the map's own numbers, so only the sums are rounded.
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()


@compiled
def test_gradients_of_bfloat16_are_those_of_float32():
    inputs = in_bfloat16(*draw_inputs(2, 33, 11, 9, 6, 1, 1.5))
    _, *found = run(operator, inputs, 1)
    _, *expected = run(operator, [value.float() for value in inputs], 1)
    for ours, theirs, given in zip(found, expected, inputs):
        assert ours.dtype == given.dtype
        torch.testing.assert_close(ours, theirs.to(given.dtype))


@compiled
def test_torch_knows_shapes_gradients_and_fakes_of_bfloat16():
    inputs = in_bfloat16(*draw_inputs(2, 3, 5, 4, 2, 2, 1.0))
    arguments = (*(value.requires_grad_() for value in inputs), 2, 1)
    torch.library.opcheck(torch.ops.fiber_d2.deform_conv2d.default, arguments)


@compiled
def test_bfloat16_keeps_what_is_no_number_and_what_is_infinite():
    inputs = list(in_bfloat16(*draw_inputs(1, 2, 4, 4, 2, 1, 0.0)))
    inputs[2] = torch.ones_like(inputs[2])
    for value in (float("nan"), float("inf"), torch.finfo(torch.bfloat16).max):
        inputs[0][0, 1, 2, 1] = value
        found = operator(*inputs, 1)
        expected = operator(*(given.float() for given in inputs), 1)
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert torch.equal(found.isnan(), expected.isnan())


@compiled
@pytest.mark.parametrize("batch", [0, 2])
def test_torch_knows_shapes_gradients_and_fakes_of_it(batch):
    x, offset, mask, weight, bias = draw_inputs(2, 3, 5, 4, 2, 2, 1.0)
    inputs = [value[:batch].requires_grad_() for value in (x, offset, mask)]
    arguments = (*inputs, weight.requires_grad_(), bias.requires_grad_(), 2, 1)
    torch.library.opcheck(torch.ops.fiber_d2.deform_conv2d.default, arguments)
    without_bias = (*arguments[:4], None, 2, 1)
    torch.library.opcheck(torch.ops.fiber_d2.deform_conv2d.default, without_bias)


@compiled
def test_numbers_that_are_none_stay_visible():
    inputs = list(draw_inputs(1, 2, 4, 4, 2, 1, 1.0))
    inputs[1][0, 4, 1, 2] = float("nan")
    found = operator(*inputs, 1)
    assert found[0, :, 1, 2].isnan().all()
    assert found.isnan().sum() == 2
    inputs[1][0, 4, 1, 2] = float("inf")
    assert operator(*inputs, 1).isfinite().all()


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, o, m, w, b: (x, o[:, :17], m, w, b), "offset and mask have shapes"),
        (lambda x, o, m, w, b: (x, o, m, w[:, :3], b), "does not fit a map"),
        (lambda x, o, m, w, b: (x, o.float(), m, w, b), "tensors of one type"),
        (lambda x, o, m, w, b: in_bfloat16(x, o, m, w, b)[:2] + (m, w, b), "tensors of one type"),
        (lambda x, o, m, w, b: (x[0], o, m, w, b), "four-dimensional"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        operator(*change(*draw_inputs(2, 4, 5, 6, 3, 1, 1.0)), 1)


@compiled
def test_layer_uses_it_where_it_can():
    inputs = draw_inputs(2, 4, 7, 9, 6, 1, 1.5, dtype=torch.float32)
    expected = _deform_conv2d_embedding_bag(*inputs, stride=1, padding=1)
    found = modulated_deform_conv2d(*inputs)
    torch.testing.assert_close(found, expected)

    with torch.profiler.profile() as profile:
        modulated_deform_conv2d(*inputs)
    keys = {event.name for event in profile.events()}
    assert "fiber_d2::deform_conv2d" in keys and "aten::embedding_bag" not in keys


@compiled
def test_a_library_built_from_older_sources_is_not_used(monkeypatch):
    def knows_no_bfloat16(x, *arguments):
        raise RuntimeError(f"not implemented for {x.dtype}")

    assert compiled_operators._load() is None
    monkeypatch.setattr(torch.ops.fiber_d2, "deform_conv2d", knows_no_bfloat16)
    assert "older sources: run `python setup.py build_ext" in compiled_operators._load()


WITHOUT = """
import sys
{before}
import torch
from fiber_d2.layers import modulated_deform_conv2d
from fiber_d2.layers.__main__ import describe
from fiber_d2.layers.compiled import is_compiled
x = torch.randn(1, 2, 3, 3)
arguments = (x, torch.zeros(1, 18, 3, 3), torch.ones(1, 9, 3, 3), torch.randn(2, 2, 3, 3))
expected = torch.nn.functional.conv2d(x, arguments[3], padding=1)
torch.testing.assert_close(modulated_deform_conv2d(*arguments), expected)
sys.stdout.write(f"{{is_compiled()}}\\n{{describe()}}")
"""


@pytest.mark.slow
def test_everything_works_without_it():
    code = WITHOUT.format(before='sys.modules["fiber_d2._C"] = None')
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False\n")
    assert "python setup.py build_ext --inplace" in result.stdout


@pytest.mark.slow
def test_a_compiler_that_fails_is_a_warning_with_a_log(tmp_path):
    import shutil

    for name in ("csrc", "fiber_d2"):
        shutil.copytree(
            REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "csrc" / "deform_conv.cpp").write_text("#error this one does not compile\n")
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "could not be built" in result.stderr
    assert "this one does not compile" in (tmp_path / "build" / "ops.log").read_text()
    assert not list((tmp_path / "fiber_d2").glob("*.so"))
