"""The training stream: complete, reproducible, the same for any number of processes."""

from __future__ import annotations

from collections import Counter
from itertools import count, islice

import numpy as np
import pytest
from detectron2.data.samplers import RepeatFactorTrainingSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.data.legacy_order import (
    legacy_aspect_groups,
    legacy_distributed_indices,
    legacy_grouped_batches,
    legacy_iteration_batches,
)
from fiber_d2.data.resampling import (
    class_aware_lines,
    image_classes,
    line_list_factors,
    repeat_factors,
)
from fiber_d2.data.samplers import _BLOCK, TrainingBatchSampler, TrainingStream


def take(stream, count, position=0):
    return list(islice(stream.start_at(position), count))


def batches(stream, count, **kwargs):
    kwargs = {"rank": 0, "world_size": 1, **kwargs}
    return list(islice(iter(TrainingBatchSampler(stream, **kwargs)), count))


def test_each_pass_shows_every_image_once():
    drawn = take(TrainingStream([3, 4], seed=1), 70)
    passes = [drawn[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 5
    assert take(TrainingStream([3, 4], seed=1), 70) == drawn
    assert take(TrainingStream([3, 4], seed=2), 70) != drawn
    assert take(TrainingStream([3], shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_weights_are_shares_of_draws_and_sets_run_through_passes():
    stream = TrainingStream([5, 50, 10], weights=[3, 1, 0], seed=0)
    drawn = take(stream, 20_000)
    counts = Counter("small" if index < 5 else "large" for index in drawn)
    # Standard deviation of the count is 61.
    assert abs(counts["small"] - 15_000) < 300
    assert max(drawn) < 55
    for low, high in ((0, 5), (5, 55)):
        own = [index for index in drawn if low <= index < high]
        size = high - low
        whole = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(sorted(one) == list(range(low, high)) for one in whole)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2 * _BLOCK + 5),
)
@settings(max_examples=25, deadline=None)
def test_stream_can_be_entered_anywhere(sizes, weighted, position):
    weights = list(range(1, len(sizes) + 1)) if weighted else None
    stream = TrainingStream(sizes, weights=weights, seed=3)
    assert take(stream, 20, position) == take(stream, position + 20)[position:]


@pytest.mark.parametrize("weights", [None, [1, 2]])
@pytest.mark.parametrize("grouped", [False, True])
def test_processes_share_the_batches_of_one(weights, grouped):
    stream = TrainingStream([6, 7], weights=weights, seed=5)
    groups = [index % 2 for index in range(13)] if grouped else None
    one = batches(stream, 30, total_batch_size=4, groups=groups)
    two = [
        batches(stream, 30, total_batch_size=4, groups=groups, rank=rank, world_size=2)
        for rank in range(2)
    ]
    for whole, first, second in zip(one, *two):
        assert whole[0::2] == first and whole[1::2] == second
        if grouped:
            assert len({groups[index] for _, index in whole}) == 1
    later = batches(stream, 10, total_batch_size=4, groups=groups, start_index=20)
    assert later == one[20:]


def test_positions_number_the_stream():
    stream = TrainingStream([6], seed=5)
    flat = [item for batch in batches(stream, 5, total_batch_size=3) for item in batch]
    assert flat == list(enumerate(take(stream, 15)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "at least one image"),
        ({"sizes": [3, 0]}, "at least one image"),
        ({"sizes": [3, 4], "weights": [1]}, "1 weights for 2"),
        ({"sizes": [3, 4], "weights": [0, 0]}, "one above"),
        ({"sizes": [3, 4], "weights": [1, -1]}, ">= 0"),
        ({"sizes": [3, 4], "weights": {5: [1, 1]}}, r"from 0 on; they are given for \[5\]"),
        ({"sizes": [3, 4], "weights": {}}, "from 0 on"),
        ({"sizes": [3, 4], "weights": {0: [1, 1], 9: [1]}}, "1 weights for 2"),
        ({"sizes": [3], "seed": -1}, "seed"),
        ({"sizes": [3, 4], "repeats": [1]}, "1 repeats"),
        ({"sizes": [3], "repeats": [0]}, "at least 1"),
        ({"sizes": [3], "repeats": [1.5]}, "whole numbers"),
        ({"sizes": [3], "repeat_factors": [[1, 2]]}, "3 images, but 2 repeat factors"),
        ({"sizes": [3], "repeat_factors": [None, None]}, "2 lists of repeat factors"),
        ({"sizes": [2], "repeat_factors": [[1, -1]]}, "from 0 to"),
        ({"sizes": [2], "repeat_factors": [[1, float("nan")]]}, "from 0 to"),
        ({"sizes": [2], "repeat_factors": [[0.3, 0.3]]}, "less than 1"),
    ],
)
def test_stream_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingStream(arguments.pop("sizes"), **arguments)


def test_batch_errors():
    stream = TrainingStream([3])
    with pytest.raises(ValueError, match="multiple of the number of processes, 2"):
        TrainingBatchSampler(stream, total_batch_size=3, rank=0, world_size=2)
    with pytest.raises(ValueError, match="start_index"):
        TrainingBatchSampler(stream, total_batch_size=2, start_index=-1)
    with pytest.raises(ValueError, match="2 group numbers for 3 images"):
        TrainingBatchSampler(stream, total_batch_size=2, groups=[0, 1])


def plain_stream(sizes, weights, shuffle, seed):
    """The order that runs of earlier versions continue with, drawn one by one."""
    if weights is None:
        sizes, weights = [sum(sizes)], [1]
    starts = np.cumsum([0, *sizes])
    shares = np.array(weights) / sum(weights)
    drawn = [0] * len(sizes)
    for block in count():
        sources = [0] * _BLOCK
        if len(sizes) > 1:
            generator = np.random.default_rng([seed, 1, block])
            sources = generator.choice(len(sizes), size=_BLOCK, p=shares)
        for source in sources:
            number, within = divmod(drawn[source], sizes[source])
            order = np.arange(sizes[source])
            if shuffle:
                order = np.random.default_rng([seed, 0, source, number]).permutation(order)
            drawn[source] += 1
            yield int(starts[source] + order[within])


def test_weights_change_where_they_are_told_to():
    change = _BLOCK + 1000
    stream = TrainingStream([5, 6], weights={0: [1, 1], change: [0, 1], change + 50: [1, 0]})
    drawn = np.array(take(stream, 2 * _BLOCK))
    constant = np.array(take(TrainingStream([5, 6], weights=[2, 2]), change))
    np.testing.assert_array_equal(drawn[:change], constant)
    assert (drawn[change : change + 50] >= 5).all() and (drawn[change + 50 :] < 5).all()
    # Passes go on where the change found them, and every entrance leads to the same images.
    own = drawn[drawn < 5]
    assert all(sorted(own[i : i + 5]) == list(range(5)) for i in range(0, len(own) - 4, 5))
    for position in (1, _BLOCK - 1, change - 1, change + 1, change + 60):
        assert take(stream, 200, position) == drawn[position : position + 200].tolist()


@pytest.mark.parametrize("weights", [None, [1, 2, 0.5]])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_order_stays_as_it_was(weights, shuffle):
    sizes = [30, 7, 3]
    stream = TrainingStream(sizes, weights=weights, shuffle=shuffle, seed=4)
    expected = list(islice(plain_stream(sizes, weights, shuffle, 4), _BLOCK + 300))
    assert take(stream, len(expected)) == expected
    assert take(stream, 250, _BLOCK + 50) == expected[_BLOCK + 50 :]


def plain_batches(stream, groups, size):
    waiting = {}
    for item in enumerate(stream.start_at(0)):
        group = waiting.setdefault(groups[item[1]], [])
        group.append(item)
        if len(group) == size:
            yield group.copy()
            group.clear()


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.sampled_from([None, "weights", "factors"]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 3000),
    st.randoms(use_true_random=False),
)
@settings(max_examples=25, deadline=None)
def test_grouped_batches_can_be_entered_anywhere(sizes, mixing, num_groups, size, start, chance):
    options = {}
    if mixing == "weights":
        options = {"weights": [1 + k for k in range(len(sizes))]}
    elif mixing == "factors":
        options = {"repeat_factors": [[1 + chance.random() for _ in range(n)] for n in sizes]}
    stream = TrainingStream(sizes, seed=2, **options)
    groups = [chance.choice([0, 3, 7, 9, 11][:num_groups]) for _ in range(sum(sizes))]
    expected = list(islice(plain_batches(stream, groups, size), start, start + 5))
    assert batches(stream, 5, total_batch_size=size, groups=groups, start_index=start) == expected


# --- how often images are shown ----------------------------------------------------------------


def test_repeated_data_sets():
    stream = TrainingStream([3, 4], repeats=[1, 5], seed=1)
    assert stream.images_per_pass == [23]
    for number in range(3):
        counts = Counter(take(stream, 23, 23 * number))
        assert counts == {**{k: 1 for k in range(3)}, **{k: 5 for k in range(3, 7)}}
    in_order = TrainingStream([2, 1], repeats=[1, 3], shuffle=False)
    assert take(in_order, 10) == [0, 1, 2, 2, 2] * 2
    # Where data sets are mixed by weight, passes of each are longer; its share stays.
    weighted = TrainingStream([3, 4], repeats=[2, 1], weights=[1, 1], seed=1)
    own = [index for index in take(weighted, 600) if index < 3]
    assert all(set(Counter(own[i : i + 6]).values()) == {2} for i in range(0, 240, 6))


@given(
    st.lists(st.floats(0, 40), min_size=1, max_size=6),
    st.integers(0, 300),
)
@settings(max_examples=20, deadline=None)
def test_factors_are_rounded_up_or_down(factors, position):
    factors[0] += 9
    stream = TrainingStream([len(factors)], repeat_factors=[factors], seed=6)
    assert take(stream, 20, position) == take(stream, position + 20)[position:]
    mean = stream.images_per_pass[0]
    assert mean == pytest.approx(sum(factors), abs=1e-4)
    begin = 0
    for number in range(1, 6):
        end = int(number * mean + 1e-9)
        counts = Counter(take(stream, end - begin, begin))
        for index, factor in enumerate(factors):
            assert int(factor - 1e-5) <= counts[index] <= int(factor + 1e-5) + 1
        begin = end


@pytest.mark.parametrize(
    "factors", [[1.3, 1.7], [0.5, 0.25, 0.25], [1, 2.5, 1.1, 0, 3.37, 1.02], [2, 1, 3], [1.25]]
)
def test_factors_are_right_on_average(factors):
    passes = 4000
    for seed in range(2):
        stream = TrainingStream([len(factors)], repeat_factors=[factors], seed=seed)
        counts = Counter(take(stream, round(passes * sum(factors))))
        for index, factor in enumerate(factors):
            rest = factor % 1
            # Four standard deviations of independent rounding, and the passes cut at the end.
            limit = 4 * (passes * rest * (1 - rest)) ** 0.5 + 4
            assert abs(counts[index] - passes * factor) < limit


def test_factors_are_drawn_anew_for_each_pass():
    stream = TrainingStream([40], repeat_factors=[[1.5] * 40], seed=0)
    twice = [
        frozenset(k for k, n in Counter(take(stream, 60, 60 * number)).items() if n == 2)
        for number in range(8)
    ]
    assert all(len(chosen) == 20 for chosen in twice) and len(set(twice)) == 8


def test_processes_share_resampled_batches():
    stream = TrainingStream([5, 6], repeats=[1, 2], repeat_factors=[[1.4] * 5, None], seed=5)
    one = batches(stream, 30, total_batch_size=6)
    parts = [batches(stream, 30, total_batch_size=6, rank=r, world_size=3) for r in range(3)]
    for whole, *shares in zip(one, *parts):
        assert [whole[rank::3] for rank in range(3)] == shares
    assert batches(stream, 5, total_batch_size=6, start_index=25) == one[25:]


records_strategy = st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=30)


def as_records(classes):
    return [{"annotations": [{"category_id": c} for c in own]} for own in classes]


@given(records_strategy, st.floats(0.001, 2))
@settings(max_examples=50, deadline=None)
def test_repeat_factors_are_those_of_detectron2(classes, threshold):
    records = as_records(classes)
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records, threshold
    )
    found = repeat_factors(image_classes(iter(records)), threshold)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@given(records_strategy, st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_class_aware_lines_show_every_class(classes, per_class, seed):
    shown = image_classes(as_records(classes))
    if not any(classes):
        with pytest.raises(ValueError, match="No image shows a class"):
            class_aware_lines(shown, per_class)
        return
    lines = class_aware_lines(shown, per_class, seed=seed)
    assert lines.tolist() == class_aware_lines(shown, per_class, seed=seed).tolist()
    seen = Counter(c for line in lines.tolist() for c in set(classes[line]))
    present = {c for own in classes for c in own}
    assert set(seen) == present and min(seen.values()) >= per_class
    assert len(lines) <= per_class * len(present)
    # The rarest class has no more than was asked for, and its images take turns.
    sizes = Counter(c for own in classes for c in set(own))
    rarest = min(sizes, key=lambda c: (sizes[c], c))
    if len(present) == 1:
        assert seen[rarest] == per_class
        assert (
            np.ptp(np.bincount(lines, minlength=len(classes))[[rarest in c for c in classes]]) <= 1
        )
    stream = TrainingStream([len(classes)], repeat_factors=[line_list_factors(lines, len(classes))])
    assert sorted(take(stream, len(lines))) == sorted(lines.tolist())


def test_resampling_errors():
    shown = image_classes(as_records([[0], []]))
    assert shown.num_images == 2
    with pytest.raises(ValueError, match="positive"):
        repeat_factors(shown, 0)
    with pytest.raises(ValueError, match="at least 1"):
        class_aware_lines(shown, 0)
    with pytest.raises(ValueError, match="beyond the 2 images"):
        line_list_factors(np.array([0, 2]), 2)


# --- the order of the published runs -----------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_legacy_ranks(size, world_size, shuffle):
    ranks = legacy_distributed_indices(size, world_size, epoch=3, shuffle=shuffle)
    whole = sum(legacy_distributed_indices(size, 1, epoch=3, shuffle=shuffle), [])
    assert sorted(whole) == list(range(size)) and (shuffle or whole == sorted(whole))
    assert len({len(rank) for rank in ranks}) == 1 and len(ranks) == world_size
    joined = sum(ranks, [])
    assert joined == (whole * world_size)[: len(joined)] and len(joined) < size + world_size


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_legacy_groups(groups, size, drop):
    order = np.random.default_rng(0).permutation(len(groups)).tolist()
    found = legacy_grouped_batches(order, groups, size, drop_uneven=drop)
    for group in set(groups):
        own = [index for index in order if groups[index] == group]
        kept = len(own) // size * size if drop else len(own)
        assert sum([b for b in found if groups[b[0]] == group], []) == own[:kept]
    firsts = [order.index(batch[0]) for batch in found]
    assert firsts == sorted(firsts)


def test_legacy_aspect_groups():
    assert legacy_aspect_groups([10, 10, 10], [9, 10, 11]) == [1, 1, 0]


def test_legacy_iterations():
    asked = []

    def of_pass(iteration):
        asked.append(iteration)
        return [[iteration], [iteration]]

    assert list(legacy_iteration_batches(of_pass, 8, 3)) == [[3], [3], [5], [5], [7]]
    assert asked == [3, 5, 7]
    assert list(legacy_iteration_batches(of_pass, 3, 3)) == []
    with pytest.raises(ValueError, match="without any batch"):
        list(legacy_iteration_batches(lambda _: [], 1))
    with pytest.raises(ValueError, match="0 images"):
        legacy_distributed_indices(0, 1)
