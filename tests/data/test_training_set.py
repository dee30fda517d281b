"""Broken images in training: tried again, replaced, counted, and not put up with for ever."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from detectron2.data.detection_utils import SizeMismatchError

from fiber_d2.data.images import ImageError
from fiber_d2.data.training_set import TrainingSet


class Images:
    """A data set whose images of the given indices fail, each so many times."""

    def __init__(self, length, failures, error=ImageError):
        self.length = length
        self.failures = dict(failures)
        self.error = error
        self.reads = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads.append(index)
        if self.failures.get(index, 0) > 0:
            self.failures[index] -= 1
            raise self.error(f"{index}.jpg cannot be read")
        return {"index": index, "draw": float(np.random.random())}


def training_set(images, **kwargs):
    return TrainingSet(images, **{"seed": 3, "retry_wait": 0.0, **kwargs})


FOREVER = 10**9


@pytest.mark.parametrize("error", [ImageError, FileNotFoundError, SizeMismatchError])
def test_a_broken_image_is_replaced_and_named(caplog, error):
    images = Images(1000, {7: FOREVER}, error)
    data = training_set(images)
    with caplog.at_level(logging.WARNING, "fiber_d2"):
        found = data[5, 7]
    assert images.reads == [7, 7, 7, found["index"]] and found["index"] != 7
    assert "number 1 of 1" in caplog.text and "7.jpg" in caplog.text
    # The replacement is a function of seed and position, not of what else was read.
    again = training_set(Images(1000, {7: FOREVER}))
    again[0, 1]
    assert again[5, 7] == found
    assert training_set(Images(1000, {7: FOREVER}))[6, 7]["index"] != found["index"]


def test_an_image_that_recovers_is_kept(caplog):
    images = Images(10, {4: 2})
    with caplog.at_level(logging.WARNING, "fiber_d2"):
        found = training_set(images)[0, 4]
    assert found == training_set(Images(10, {}))[0, 4]
    assert images.reads == [4, 4, 4] and not caplog.records


def test_too_many_broken_images_stop_the_training():
    broken = {index: FOREVER for index in range(100, 200)}
    data = training_set(Images(10_000, broken), retries=0, max_failed_share=0.05)
    for position in range(300):
        data[position, 0]
    with pytest.raises(ValueError, match=r"17 of 333 .* share of 0\.05 .*116\.jpg cannot be read"):
        for number in range(100):
            data[300 + number, 100 + number]
    assert (data.num_drawn, data.num_failed) == (333, 17)


def test_share_of_zero_still_forgives_a_few():
    data = training_set(
        Images(10**6, {i: FOREVER for i in range(50)}), retries=0, max_failed_share=0.0
    )
    for index in range(9):
        data[index, index]
    with pytest.raises(ValueError, match="10 of 19 training images cannot be read"):
        data[9, 9]


def test_other_errors_are_not_hidden():
    images = Images(10, {4: 1}, KeyError)
    with pytest.raises(KeyError, match="4.jpg"):
        training_set(images)[0, 4]
    assert images.reads == [4]


def test_nothing_readable_ends_at_once():
    data = training_set(Images(50, {i: FOREVER for i in range(50)}), retries=1)
    with pytest.raises(ValueError, match="10 of 10 training images cannot be read"):
        data[0, 0]


@pytest.mark.parametrize(
    "options", [{"retries": -1}, {"retry_wait": -0.1}, {"max_failed_share": 1.5}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        training_set(Images(1, {}), **options)
