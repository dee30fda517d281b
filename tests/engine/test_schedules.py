import math

import pytest
import torch
from detectron2.solver import LRMultiplier
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fiber_d2.engine.schedules import (
    PlateauSchedule,
    PublishedCosine,
    milestone_iterations,
    warmup_cosine,
    warmup_multistep,
)


def make_optimizer(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": r} for r in rates])


def rates_of(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_milestones_round_a_half_to_the_even_iteration():
    # 0.67 of 1250 is 837.5, 0.89 of it 1112.5.
    assert milestone_iterations([0.67, 0.89], 1250) == [838, 1112]
    assert milestone_iterations([0.5, 700, 900], 1000) == [500, 700, 900]
    for wrong in ([0.9, 0.5], [-1, 5], [600, 0.5]):
        with pytest.raises(ValueError, match="rising order"):
            milestone_iterations(wrong, 1000)


def test_steps_with_and_without_warmup():
    factor = warmup_multistep(max_iter=100, milestones=[0.67, 0.89], gamma=0.1)
    found = [factor(it / 100) for it in (0, 66, 67, 88, 89, 99)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    factor = warmup_multistep(max_iter=100, warmup_iters=10, warmup_factor=0.0)
    assert [factor(it / 100) for it in (0, 5, 10, 67)] == pytest.approx([0, 0.5, 1, 0.1])


def test_a_warmup_longer_than_the_run_multiplies_the_drops():
    factor = warmup_multistep(max_iter=1250, warmup_iters=2000, warmup_factor=1e-3).factor
    assert factor(837) == 1e-3 * (1 - 837 / 2000) + 837 / 2000
    assert factor(838) == pytest.approx(0.1 * (1e-3 * (1 - 0.419) + 0.419))


def test_a_run_of_two_iterations():
    schedule = warmup_multistep(max_iter=2, milestones=[0.67, 0.89])
    assert schedule.milestones == [1, 2]
    assert [schedule.factor(i) for i in range(2)] == pytest.approx([1, 0.1])


@given(st.integers(1, 3_000_000), st.data())
def test_the_share_of_a_run_names_its_iteration(max_iter, data):
    iteration = data.draw(st.integers(0, max_iter - 1))
    schedule = warmup_multistep(max_iter=max_iter, milestones=[iteration + 1], gamma=0.5)
    # What Detectron2's scheduler hands over.
    assert schedule(iteration / max_iter) == 1.0
    assert schedule((iteration + 1) / max_iter) == 0.5


def test_detectron2_steps_it():
    optimizer = make_optimizer(1.0, 0.1)
    schedule = warmup_multistep(max_iter=10, warmup_iters=4, warmup_factor=0.2)
    scheduler = LRMultiplier(optimizer, schedule, max_iter=10)
    found = []
    for _ in range(10):
        found.append(rates_of(optimizer))
        optimizer.step()
        scheduler.step()
    factors = [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 0.1, 0.1, 0.01]
    assert found == [pytest.approx([f, 0.1 * f]) for f in factors]


def test_cosine_with_warmup():
    factor = warmup_cosine(max_iter=100, warmup_iters=10, warmup_factor=0.1, end_factor=0.0)
    at_ten = 0.5 * (1 + math.cos(math.pi * 0.1))
    assert factor(0.0) == pytest.approx(0.1)
    assert factor(0.05) == pytest.approx(0.1 + 0.5 * (at_ten - 0.1))
    assert factor(0.55) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.55)))
    assert factor(1.0) == pytest.approx(0.0)


def test_the_published_cosine_has_one_floor_for_all_groups():
    schedule = PublishedCosine(max_iter=100, warmup_iters=20, warmup_factor=0.1, min_lr=0.05)
    optimizer = make_optimizer(1.0, 0.1)
    scheduler = schedule.attach(optimizer)
    found = []
    for _ in range(100):
        found.append(rates_of(optimizer))
        optimizer.step()
        scheduler.step()
    assert found[0] == pytest.approx([0.1, 0.01])
    assert found[10] == pytest.approx([0.55, 0.055])
    assert found[20] == pytest.approx([1.0, 0.1])
    # A quarter of the run after the warm-up the cosine has done a quarter of its half wave.
    half = (1 + math.cos(math.pi / 4)) / 2
    assert found[45] == pytest.approx([0.05 + 0.95 * half, 0.05 + 0.05 * half])
    # It ends at 0.79 of the half wave, above its floor.
    last = (1 + math.cos(0.79 * math.pi)) / 2
    assert found[99] == pytest.approx([0.05 + 0.95 * last, 0.05 + 0.05 * last])
    later = make_optimizer(1.0, 0.1)
    for group in later.param_groups:
        group["initial_lr"] = group["lr"]
    schedule.attach(later, last_iter=44)
    assert rates_of(later) == found[45]


@pytest.mark.parametrize(
    "schedule", [PublishedCosine(max_iter=100, warmup_iters=20), PlateauSchedule(warmup_iters=20)]
)
def test_what_is_attached_is_described_as_its_schedule(schedule):
    text = schedule.attach(make_optimizer(1.0)).describe()
    assert text == schedule.describe()
    assert text.startswith("warm-up of 20 iterations from x0.001; ")


def test_plateau_drops_after_patience_and_one_more():
    optimizer = make_optimizer(1.0, 0.05)
    scheduler = PlateauSchedule(gamma=0.1, patience=2, min_lr=0.01).attach(optimizer)
    found = []
    for metric in (0.3, 0.4, 0.4, None, 0.0, math.nan, 0.40003, 0.39, 0.5, 0.1, 0.2, 0.3, 0.4):
        scheduler.step()
        scheduler.step(metric)
        found.append(rates_of(optimizer))
    # 0.40003 is a rise of less than a ten-thousandth: the third evaluation in a row without one.
    assert found[6] == [1.0, 0.05]
    assert found[7] == pytest.approx([0.1, 0.01])
    assert found[10] == pytest.approx([0.1, 0.01])
    # 0.5 is a new best, then come 0.1, 0.2, 0.3.
    assert found[11] == pytest.approx([0.01, 0.01])
    assert scheduler.best == 0.5


def test_plateau_after_a_warmup_that_evaluations_advance():
    optimizer = make_optimizer(1.0)
    schedule = PlateauSchedule(patience=0, warmup_iters=4, warmup_factor=0.2)
    scheduler = schedule.attach(optimizer)
    found = [optimizer.param_groups[0]["lr"]]
    # Evaluations within the warm-up are not judged: the falling 0.1 drops nothing.
    for metric in (None, 0.9, None, 0.1, 0.5, 0.4):
        scheduler.step(metric)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.2, 0.2, 0.4, 0.6, 1.0, 1.0, 0.1])


def test_plateau_of_errors():
    optimizer = make_optimizer(1.0)
    scheduler = PlateauSchedule(patience=0, mode="min").attach(optimizer)
    for error in (3.0, 2.0, 1.0):
        scheduler.step(error)
    assert rates_of(optimizer) == [1.0]
    scheduler.step(1.5)
    assert rates_of(optimizer) == pytest.approx([0.1])


@pytest.mark.parametrize("warmup_iters", [0, 7])
@pytest.mark.parametrize("stop", [1, 4, 9, 13])
def test_plateau_goes_on_where_it_was(warmup_iters, stop):
    metrics = [0.1, 0.3, 0.2, 0.2, 0.3, 0.1, 0.4, 0.2, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1]
    schedule = PlateauSchedule(patience=1, warmup_iters=warmup_iters, min_lr=0.0)

    def run(optimizer, scheduler, metrics):
        found = []
        for metric in metrics:
            scheduler.step()
            scheduler.step(metric)
            found += rates_of(optimizer)
        return found

    optimizer = make_optimizer(1.0, 0.1)
    whole = run(optimizer, schedule.attach(optimizer), metrics)
    first = make_optimizer(1.0, 0.1)
    scheduler = schedule.attach(first)
    found = run(first, scheduler, metrics[:stop])
    second = make_optimizer(1.0, 0.1)
    second.load_state_dict(first.state_dict())
    again = schedule.attach(second, last_iter=2 * stop - 1)
    again.load_state_dict(scheduler.state_dict())
    assert found + run(second, again, metrics[stop:]) == whole


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: warmup_cosine(max_iter=0), "0 iterations"),
        (lambda: warmup_multistep(max_iter=10, warmup_iters=-1), "-1 of warm-up"),
        (lambda: PublishedCosine(max_iter=0), "0 iterations"),
        (lambda: PlateauSchedule(gamma=1.0), "gamma is 1.0"),
        (lambda: PlateauSchedule(patience=-1), "patience -1"),
        (lambda: PlateauSchedule(mode="up"), "mode 'up'"),
    ],
)
def test_impossible_schedules(make, match):
    with pytest.raises(ValueError, match=match):
        make()
