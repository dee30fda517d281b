"""Window attention against its definition, token by token, in float64."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from fiber_d2.modeling.swin import SwinBlock, WindowAttention
from fiber_d2.modeling.windows import (
    _HAS_OPERATORS,
    from_windows,
    shift_regions,
    to_windows,
    window_partition,
    window_reverse,
)

needs_operators = pytest.mark.skipif(
    not _HAS_OPERATORS, reason="torch older than 2.7 compiles windows without these operators"
)

HEADS, DIM = 2, 12
# One window; one row; one column; padding on one side, on both, on none.
SIZES = [(3, 3), (2, 7), (7, 2), (6, 7), (7, 8), (9, 6)]


def make(shift, window=3):
    torch.manual_seed(0)
    module = WindowAttention(
        dim=DIM,
        window=window,
        shift=shift,
        num_heads=HEADS,
        text_attention=None,
        position_bias_std=1.0,
    )
    for parameter in (module.qkv.bias, module.proj.bias):
        torch.nn.init.normal_(parameter)
    return module


def plain(module, x):
    """One map ``(H, W, C)`` after the definition: what token reads what, and how much."""
    window, shift = module.window, module.shift
    height, width = x.shape[:2]
    padded = [-(-size // window) * window for size in (height, width)]
    qkv = module.qkv.bias.expand(*padded, -1).clone()
    qkv[:height, :width] = module.qkv(x)
    query, key, value = qkv.unflatten(-1, (3, HEADS, -1)).unbind(2)  # each (H, W, heads, d)

    def place(row, column):
        """Window, place in it, and whether the shift brought the token around, per axis."""
        moved = [(i - shift) % size for i, size in zip((row, column), padded)]
        around = tuple(i < shift for i in (row, column))
        return [i // window for i in moved], [i % window for i in moved], around

    table = module.relative_position_bias_table
    tokens = [(i, j) for i in range(padded[0]) for j in range(padded[1])]
    out = torch.zeros(height, width, DIM, dtype=x.dtype)
    for i, j in tokens:
        if i >= height or j >= width:
            continue
        where, here, around = place(i, j)
        scores, values = [], []
        for k, m in tokens:
            if place(k, m)[0] != where:
                continue
            _, there, came_around = place(k, m)
            row, column = (a - b + window - 1 for a, b in zip(here, there))
            score = (query[i, j] * key[k, m]).sum(-1) * (DIM // HEADS) ** -0.5
            score = score + table[row * (2 * window - 1) + column]
            scores.append(score - 100.0 * (came_around != around))
            values.append(value[k, m])
        weights = torch.stack(scores).softmax(0)  # (tokens of the window, heads)
        out[i, j] = (weights[..., None] * torch.stack(values)).sum(0).flatten()
    return module.proj(out)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("height,width", SIZES)
def test_attention_is_its_definition(height, width, shift):
    module = make(shift).double()
    x = torch.randn(2, height, width, DIM, dtype=torch.float64)
    expected = torch.stack([plain(module, one) for one in x])
    # The kernel of evaluation, and what training takes on CPUs.
    with torch.no_grad():
        torch.testing.assert_close(module(x, None, None), expected, rtol=1e-9, atol=1e-9)
    # Scores of training are in float32 at least, and of no more.
    found = module(x, None, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [0, 1])
def test_gradients_with_and_without_a_learning_bias(shift):
    """A frozen table goes with the other kernel; the gradients of the rest are the same."""
    found = []
    for learns in (True, False):
        module = make(shift)
        module.relative_position_bias_table.requires_grad_(learns)
        x = torch.randn(2, 7, 8, DIM, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        module(x, None, None).sin().sum().backward()
        found.append([x.grad, module.qkv.weight.grad, module.proj.weight.grad])
        assert (module.relative_position_bias_table.grad is not None) == learns
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_bias():
    module = make(1)
    x = torch.randn(1, 6, 7, DIM)
    module(x, None, None).sin().sum().backward()
    gradient = module.relative_position_bias_table.grad.clone()
    module.zero_grad()
    plain(module, x[0]).sin().sum().backward()
    torch.testing.assert_close(
        gradient, module.relative_position_bias_table.grad, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("shift", [0, 6])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_evaluation_takes_the_fused_kernel(shift, dtype):
    """Of 12 x 12 tokens, as FIBER-B's; otherwise the scores of all windows would be in memory."""
    module = make(shift, window=12)
    x = torch.randn(2, 20, 30, DIM)
    expected = module(x, None, None)
    precision = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.no_grad(), precision, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = module(x, None, None)
    unit = torch.finfo(dtype or torch.float32).eps
    assert (found - expected).abs().max() < 8 * unit * expected.abs().max()


def test_partition_and_its_inverse():
    x = torch.arange(2 * 6 * 9 * 4).view(2, 6, 9, 4)
    windows = window_partition(x, 3)
    assert windows.shape == (2, 2, 3, 9, 4)
    assert torch.equal(windows[1, 1, 2].view(3, 3, 4), x[1, 3:6, 6:9])
    assert torch.equal(window_reverse(windows, 3), x)


@needs_operators
@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 9)] * 2, st.integers(1, 4), st.integers(0, 3))
def test_windows_as_operators_of_their_own(height, width, window, shift):
    """What torch.compile sees: the same numbers, sizes without numbers, and gradients."""
    shift = min(shift, window - 1)
    x = torch.randn(2, height, width, 3, dtype=torch.float64, requires_grad=True)
    found = torch.ops.fiber_d2.to_windows(x, window, shift)
    assert torch.equal(found, to_windows(x, window, shift))
    back = torch.ops.fiber_d2.from_windows(found, window, shift, height, width)
    assert torch.equal(back, x)
    assert torch.equal(back, from_windows(found, window, shift, height, width))
    windows = torch.randn_like(found).requires_grad_()
    for operator, arguments in (
        (torch.ops.fiber_d2.to_windows, (x, window, shift)),
        (torch.ops.fiber_d2.from_windows, (windows, window, shift, height, width)),
    ):
        torch.library.opcheck(operator, arguments)
        assert torch.autograd.gradcheck(operator, arguments)


@needs_operators
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, g++")
def test_inductor_compiles_a_shifted_block_for_all_sizes():
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    block = SwinBlock(dim=16, num_heads=2, window=3, shift=1)
    compiled = torch.compile(block, dynamic=True, fullgraph=True)
    for number, (batch, height, width) in enumerate([(2, 10, 14), (3, 17, 11)]):
        x = torch.randn(batch, height, width, 16)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            found = compiled(x)
        assert counters["stats"]["unique_graphs"] == 1
        gradients = []
        for output in (found, block(x)):
            block.zero_grad()
            output.square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in block.parameters()])
        torch.testing.assert_close(found, block(x))
        torch.testing.assert_close(*gradients)


def test_only_the_edge_mixes_regions():
    regions = shift_regions(3, 4, 5, 2, torch.device("cpu"))
    mixed = (regions != regions[..., :1]).any(-1)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[-1] = expected[:, -1] = True
    assert torch.equal(mixed, expected)
    assert len(regions[-1, -1].unique()) == 4
