"""Linear layers by oneDNN are linear layers; what oneDNN is not for is left to PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fiber_d2.layers import Linear, linear
from fiber_d2.layers.linear import onednn_product

SHAPES = [(7, 16), (16,), (1, 16), (3, 4, 5, 16), (2, 3, 1000, 16)]
needs_onednn = pytest.mark.skipif(
    onednn_product() is None, reason="this torch has no mkldnn::_linear_pointwise"
)


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))

    @property
    def by_onednn(self):
        return any("_linear_pointwise" in name for name in self.names)


def tensors(shape, bias=True, outputs=9, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    x = torch.randn(*shape, dtype=dtype)
    weight = torch.randn(outputs, shape[-1], dtype=dtype)
    return x, weight, torch.randn(outputs, dtype=dtype) if bias else None


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(shape, bias):
    given = [t if t is None else t.requires_grad_() for t in tensors(shape, bias)]
    exact = [t if t is None else t.detach().double().requires_grad_() for t in given]
    with Calls() as calls:
        found = linear(*given)
    assert calls.by_onednn
    expected = F.linear(*exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(found)
    found.backward(slope)
    expected.backward(slope.double())
    for ours, theirs in zip(given, exact):
        if ours is not None:
            assert ours.grad.shape == ours.shape
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=2e-4)


@needs_onednn
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_inputs_that_are_not_contiguous(layout):
    x = {
        "transposed": torch.randn(5, 8, 16).transpose(0, 1),
        "sliced": torch.randn(6, 9, 40)[1:, ::2, 3:19],
        "expanded": torch.randn(1, 8, 16).expand(4, -1, -1),
    }[layout].requires_grad_()
    _, weight, bias = tensors((16,))
    torch.testing.assert_close(
        linear(x, weight.t().contiguous().t(), bias), F.linear(x, weight, bias)
    )
    gradients = [
        torch.autograd.grad(f(x, weight, bias).square().sum(), x)[0] for f in (linear, F.linear)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("learns", [(True, False), (False, True), (False, False)])
def test_only_what_learns_gets_a_gradient_and_is_kept(learns):
    x, weight, bias = tensors((7, 16))
    x.requires_grad_(learns[0])
    weight.requires_grad_(learns[1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear(x, weight, bias)
    assert y.requires_grad == any(learns)
    assert {id(t) for t in kept} == {
        id(t) for t, needed in ((weight, learns[0]), (x, learns[1])) if needed
    }
    if any(learns):
        y.sum().backward()
    assert [t.grad is not None for t in (x, weight)] == list(learns)


@needs_onednn
def test_the_layer_has_pytorch_s_names_and_uses_it():
    layer = Linear(16, 9)
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(3, 16)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context, Calls() as calls:
            found = layer(x)
        assert calls.by_onednn
        torch.testing.assert_close(found, F.linear(x, layer.weight, layer.bias))


def left_to_pytorch(x, weight, bias):
    with Calls() as calls:
        found = linear(x, weight, bias)
    assert not calls.by_onednn
    assert torch.equal(found, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(dtype):
    left_to_pytorch(*tensors((7, 16), dtype=dtype))


def test_autocast_empty_and_switched_off_are_left_to_pytorch():
    x, weight, bias = tensors((7, 16))
    left_to_pytorch(x[:0], weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
        left_to_pytorch(x, weight, bias)
    with torch.backends.mkldnn.flags(enabled=False):
        left_to_pytorch(x, weight, bias)


def test_without_the_operator_pytorch_does_it(monkeypatch):
    monkeypatch.setitem(linear.__globals__, "onednn_product", lambda: None)
    left_to_pytorch(*tensors((7, 16)))


def test_an_operator_that_asks_for_other_arguments_is_not_used(monkeypatch):
    class Other:
        class _linear_pointwise:
            @staticmethod
            def default(*arguments):
                raise TypeError("expected 7 arguments")

    monkeypatch.setattr(torch.ops, "mkldnn", Other)
    assert onednn_product.__wrapped__() is None


def test_fake_tensors_tracing_and_export_see_pytorch_s_operator():
    layer, x = Linear(16, 9), torch.randn(3, 16)
    with FakeTensorMode() as mode, Calls() as calls:
        assert linear(*(mode.from_tensor(t) for t in tensors((3, 16)))).shape == (3, 9)
    assert not calls.by_onednn
    graph = torch.export.export(layer, (x,)).graph
    assert any("aten.linear" in str(node.target) for node in graph.nodes)
    assert "aten::linear" in str(torch.jit.trace(layer, x).inlined_graph)
