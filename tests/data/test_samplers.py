"""The training stream: complete, reproducible, the same for any number of processes."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
        ({"sizes": [3], "seed": -1}, "seed"),
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
