"""Schedules and rates in words."""

import itertools
import re

import pytest
import torch
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fiber_d2.data.samplers import TrainingStream
from fiber_d2.engine.optimizer import get_param_groups
from fiber_d2.engine.outlook import describe_rates, describe_schedule, rate_kinds
from fiber_d2.engine.schedules import warmup_cosine, warmup_multistep


@given(
    max_iter=st.integers(200, 4000),
    fractions=st.lists(st.floats(0.2, 0.99), min_size=1, max_size=4, unique=True),
    warmup=st.integers(0, 30),
)
def test_steps_are_found_where_the_factor_changes(max_iter, fractions, warmup):
    milestones = sorted({round(max_iter * fraction) for fraction in fractions})
    gaps = [later - earlier for earlier, later in zip(milestones, milestones[1:])]
    if gaps and min(gaps) < 3:  # a step is flat on both sides
        return
    schedule = warmup_multistep(
        max_iter=max_iter, warmup_iters=warmup, warmup_factor=0.01, milestones=milestones
    )
    # One iteration after the other.
    factors = [schedule(i / max_iter) for i in range(max_iter)]
    changes = [i for i in range(warmup + 1, max_iter) if abs(factors[i] - factors[i - 1]) > 1e-12]
    text = describe_schedule(schedule, max_iter)
    assert [int(i) for i in re.findall(r"x0\.1 at (\d+)", text)] == changes
    assert text.startswith(f"warm-up of {warmup} iterations from x0.01" if warmup else "x0.1 at")


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (ConstantParamScheduler(1.0), "constant"),
        (LinearParamScheduler(1.0, 0.5), "smoothly from x1 to x0.5"),
        (
            warmup_cosine(max_iter=1000, warmup_iters=100, end_factor=0.1),
            "warm-up of 100 iterations from x0.001; smoothly from x0.978 to x0.1",
        ),
        (
            MultiStepParamScheduler([1, 0.5, 0.05], milestones=[500, 900], num_updates=1000),
            "x0.5 at 500; x0.1 at 900",
        ),
    ],
)
def test_other_schedules(schedule, expected):
    assert describe_schedule(schedule, 1000) == expected


def test_few_iterations():
    for max_iter, warmup in itertools.product(range(1, 6), range(4)):
        assert describe_schedule(warmup_cosine(max_iter=max_iter, warmup_iters=warmup), max_iter)


def test_what_describes_itself_and_what_does_not():
    class Described:
        def describe(self):
            return "as it likes"

    assert describe_schedule(Described(), 10) == "as it likes"
    assert describe_schedule(object(), 10) == "object"


def test_an_optimizer_of_detectron2_follows_its_schedule():
    from detectron2.solver import LRMultiplier

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = warmup_multistep(max_iter=100, milestones=[50])
    assert describe_schedule(LRMultiplier(optimizer, schedule, 100), 100) == "x0.1 at 50"


def towers():
    return nn.ModuleDict(
        {
            "backbone": nn.ModuleDict({"text": nn.Linear(2, 2), "swin": nn.Linear(2, 2)}),
            "head": nn.Linear(2, 2),
        }
    )


@pytest.mark.parametrize(
    "factors, expected",
    [
        ({}, "all 0.01"),
        ({"bias_lr_factor": 2.0}, "all 0.01, all_bias 0.02"),
        ({"text_lr_factor": 0.1}, "text 0.001, image+head 0.01"),
        (
            {"text_lr_factor": 0.1, "vision_lr_factor": 0.5, "bias_lr_factor": 3.0},
            "text 0.001, text_bias 0.003, image 0.005, image_bias 0.015, head 0.01, head_bias 0.03",
        ),
    ],
)
def test_kinds_of_parameters_with_a_rate_of_their_own(factors, expected):
    model = towers()
    groups = get_param_groups(model, base_lr=0.01, weight_decay=0.1, **factors)
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    assert describe_rates(model, optimizer) == expected
    for kind, number in rate_kinds(model, optimizer).items():
        assert f"{kind} {optimizer.param_groups[number]['lr']:.3g}" in expected
    # A schedule's factor changes none of it.
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    assert describe_rates(model, optimizer) == expected


@pytest.mark.parametrize("weights", [None, [1, 3], {0: [1, 1], 5000: [0, 1], 9000: [3, 1]}])
def test_passes_after_so_many_draws(weights):
    stream = TrainingStream([16, 48], weights=weights, repeats=[2, 1], seed=5)
    draws = 20_000
    found = stream.passes_after(draws)
    indices = torch.tensor(list(itertools.islice(stream.start_at(0), draws)))
    counts = torch.stack([(indices < 16).sum(), (indices >= 16).sum()]).float()
    if weights is None:
        assert found == [draws / (16 * 2 + 48)]
    else:
        passes = counts / torch.tensor([32.0, 48.0])
        # Four standard deviations of the drawn numbers.
        assert torch.allclose(passes, torch.tensor(found), atol=4 * (draws / 4) ** 0.5 / 32)
