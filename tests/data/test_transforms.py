"""Sizes against the stored reference; mirrored captions against a word-by-word exchange."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import transforms as T
from hypothesis import given
from hypothesis import strategies as st

from fiber_d2.data import ResizeShortestEdgeTruncated, swap_left_right_words
from fiber_d2.data.transforms import count_horizontal_flips, mirror_caption

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data_eval"
SIZES = json.loads((FIXTURES / "f_merge_and_boxes.json").read_text())["resize_sizes"]


@pytest.mark.parametrize("case", SIZES, ids=lambda case: "{}x{}".format(*case["wh"]))
def test_resize_sizes_of_the_reference(case):
    width, height = case["wh"]
    augmentation = ResizeShortestEdgeTruncated(case["min_size"], case["max_size"])
    image = np.broadcast_to(np.zeros((), dtype=np.uint8), (height, width, 3))
    transform = augmentation.get_transform(image)
    assert [transform.new_h, transform.new_w] == case["out_hw"]


def test_resize_applies_to_image_and_boxes_and_draws_from_choices():
    augmentation = ResizeShortestEdgeTruncated((20, 30), 1000, sample_style="choice")
    image = np.zeros((10, 15, 3), dtype=np.uint8)
    seen = set()
    for _ in range(30):
        augmented = T.AugInput(image, boxes=np.array([[0.0, 0, 15, 10]]))
        augmentation(augmented)
        seen.add(augmented.image.shape)
        height, width, _ = augmented.image.shape
        np.testing.assert_allclose(augmented.boxes, [[0, 0, width, height]])
    assert seen == {(20, 30, 3), (30, 45, 3)}


def test_count_horizontal_flips():
    flip, none = T.HFlipTransform(10), T.NoOpTransform()
    assert count_horizontal_flips(T.TransformList([flip, none, T.VFlipTransform(4)])) == 1
    assert count_horizontal_flips(T.TransformList([flip, T.TransformList([flip])])) == 2


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("the dog left of the cat", "the dog right of the cat"),
        ("Left, RIGHT and right", "Right, LEFT and left"),
        (
            "the leftmost one, bright leftovers, copyright",
            "the rightmost one, bright leftovers, copyright",
        ),
        ("left-most left.", "right-most right."),
        ("nothing here", "nothing here"),
    ],
)
def test_words_are_exchanged(caption, expected):
    assert swap_left_right_words(caption, [])[0] == expected
    assert swap_left_right_words(expected, [])[0] == caption


WORDS = st.lists(st.sampled_from(["left", "Right", "LEFT", "leftmost", "dog", "é"]), max_size=8)


@given(WORDS, st.data())
def test_spans_stay_on_their_words(words, data):
    begins = np.cumsum([0, *(len(word) + 1 for word in words)])
    pairs = [
        sorted(
            (data.draw(st.integers(0, len(words) - 1)), data.draw(st.integers(0, len(words) - 1)))
        )
        for _ in range(2 if words else 0)
    ]
    spans = [[int(begins[a]), int(begins[b]) + len(words[b])] for a, b in pairs]
    exchange = {"left": "right", "Right": "Left", "LEFT": "RIGHT", "leftmost": "rightmost"}
    caption, moved = swap_left_right_words(" ".join(words), spans)
    new_words = [exchange.get(word, word) for word in words]
    assert caption == " ".join(new_words)
    assert [caption[b:e] for b, e in moved] == [" ".join(new_words[a : b + 1]) for a, b in pairs]


@given(st.text(alphabet="left righ", max_size=30), st.data())
def test_any_span_stays_in_the_caption_and_in_order(caption, data):
    border = st.integers(0, len(caption))
    spans = data.draw(st.lists(st.tuples(border, border).map(sorted), max_size=5))
    swapped, moved = swap_left_right_words(caption, spans)
    assert all(0 <= begin <= end <= len(swapped) for begin, end in moved)


def test_mirror_caption_moves_all_spans_of_a_record():
    record = {
        "caption": "left dog, right cat",
        "annotations": [{"tokens_positive": [(0, 8)]}, {"tokens_positive": []}, {}],
        "tokens_positive_eval": [[[10, 19]], [[5, 8], [16, 19]]],
    }
    mirror_caption(record)
    assert record == {
        "caption": "right dog, left cat",
        "annotations": [{"tokens_positive": [[0, 9]]}, {"tokens_positive": []}, {}],
        "tokens_positive_eval": [[[11, 19]], [[6, 9], [16, 19]]],
    }
