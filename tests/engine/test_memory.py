"""Counted memory against what the parts really hold."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fiber_d2.engine.memory import (
    estimate_memory,
    in_units,
    measured_activations,
    num_bytes,
    optimizer_bytes,
    peak_process_bytes,
)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)
        self.register_buffer("constant", torch.zeros(11))

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "AMSGrad": lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_of_an_optimizer_before_its_first_step(make, dtype):
    model = Pair().to(dtype)
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    others = [p for name, p in model.named_parameters() if "bias" not in name]
    optimizer = make([{"params": others}, {"params": biases, "lr": 0.2}])
    expected = optimizer_bytes(optimizer)
    model(torch.ones(2, 5, dtype=dtype)).sum().backward()
    optimizer.step()
    held = [x for state in optimizer.state.values() for x in state.values()]
    assert expected == num_bytes(x for x in held if isinstance(x, torch.Tensor))


def test_an_optimizer_that_wants_more_is_not_known():
    class Other(torch.optim.SGD):
        def __init__(self, groups, needed):
            super().__init__(groups, lr=0.1)

    optimizer = Other(Pair().parameters(), needed=1)
    assert optimizer_bytes(optimizer) is None
    assert estimate_memory(Pair(), optimizer).optimizer is None
    assert in_units(None) == "unknown"


def test_what_two_layers_keep():
    model = Pair()
    x = torch.ones(16, 5)
    with measured_activations(model) as measured:
        loss = model(x).square().sum()
    # The input, the ReLU's output (which the second layer keeps as well), and what is squared.
    assert measured.num_bytes == 4 * 16 * (5 + 7 + 3)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, found, expected))


def test_recomputation_keeps_less():
    model = Pair()
    x = torch.ones(16, 5, requires_grad=True)
    with measured_activations(model) as measured:
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert measured.num_bytes <= 4 * 16 * 5


def test_parts_and_their_sum(monkeypatch):
    model = Pair()
    model.second.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    weights, trainable = 5 * 7 + 7 + 7 * 3 + 3, 5 * 7 + 7 + 3
    known = estimate_memory(model, optimizer, averaged=True, activations=1000)
    assert known.parameters == known.averaged == 4 * (weights + 11)
    assert known.gradients == 4 * trainable
    # Two numbers for each weight, and for each of three tensors the number of its steps.
    assert known.optimizer == 4 * (2 * trainable + 3)
    assert known.total == 2 * known.parameters + known.gradients + known.optimizer + 1000
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    for views, copies in ((True, 1), (False, 2)):
        several = estimate_memory(model, optimizer, bucket_views=views)
        assert several.gradients == copies * known.gradients


def test_the_peak_of_a_process_covers_what_it_once_held():
    before = peak_process_bytes()
    # As much again as was ever held, touched so that it is really there.
    block = torch.ones(before, dtype=torch.uint8)
    assert peak_process_bytes() >= before + 0.5 * len(block)
    del block
    assert peak_process_bytes() >= 1.5 * before


@pytest.mark.parametrize(
    "number, text", [(0, "0.0 MiB"), (20 * 2**20, "20.0 MiB"), (3 * 2**29, "1.50 GiB")]
)
def test_units(number, text):
    assert in_units(number) == text
