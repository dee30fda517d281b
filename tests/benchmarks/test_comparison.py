"""The work of the benchmarks at small size: both models do it, with the same results."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from fiber_d2.layers.compiled import is_compiled, why_not_compiled


@pytest.mark.parametrize("name", ["model", "chunks", "training_step"])
def test_both_do_the_work(load, name):
    args = Namespace(size="small", memory="product", reference_prompts=1)
    case = load(name).build(args, ("reference", "product"))
    assert max(case.check().values()) <= 1e-4
    for one_pass in case.passes.values():
        assert all(seconds > 0 for seconds in one_pass().values())
    # Where overlaps are nearly equal, suppression may fall either way.
    assert case.check_after().get("detections_missing", 0.0) < 0.05


@pytest.mark.skipif(not is_compiled(), reason=f"compiled operators: {why_not_compiled()}")
def test_token_losses_are_compared_timed_and_written_down(load):
    focal_loss, table = load("focal_loss"), load("table")
    found = focal_loss.measure((2, 50, 3, 16, 12), repeats=1)
    assert found["largest_relative_difference"] <= focal_loss.TOLERANCE
    found["extra_memory_mib"] = focal_loss.extra_memory((2, 50, 3, 16, 12))
    rows = table.focal_loss_table({"cases": {"small": found}}).splitlines()
    assert [row.split(" | ")[1] for row in rows[2:]] == list(focal_loss.METHODS)


def test_a_difference_ends_the_program(load):
    comparison = load("comparison")
    ones = torch.ones(3)
    assert comparison.compare(ones, ones, "x") == 0
    with pytest.raises(SystemExit, match="x: product and reference differ"):
        comparison.compare(ones * 1.001, ones, "x")
    with pytest.raises(SystemExit):
        comparison.compare(ones * float("nan"), ones, "x")


def test_nan_ends_the_program_wherever_it_is(load, monkeypatch):
    deform_conv = load("deform_conv")
    ones, nan = torch.ones(3), torch.full((3,), float("nan"))
    found = {name: {"results": [ones, ones]} for name in deform_conv.METHODS}
    assert not any(deform_conv.check(found).values())
    found["compiled"]["results"] = [nan, ones]
    with pytest.raises(SystemExit, match="results differ by nan"):
        deform_conv.check(found)

    focal_loss = load("focal_loss")
    found = {name: {"results": [ones, ones]} for name in focal_loss.METHODS}
    assert focal_loss.check(found) == 0
    found["compiled"]["results"] = [ones, nan]
    with pytest.raises(SystemExit, match="results differ by nan"):
        focal_loss.check(found)

    training_step = load("training_step")
    build_product = training_step.build_product

    def build_with_a_nan(size):
        model = build_product(size)
        *_, last = model.parameters()
        last.register_hook(lambda grad: grad * float("nan"))
        return model

    monkeypatch.setattr(training_step, "build_product", build_with_a_nan)
    case = training_step.build(Namespace(size="small"), ())
    with pytest.raises(SystemExit, match="gradients differ by nan"):
        case.check()
