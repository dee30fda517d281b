import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.colors import PALETTE
from fiber_d2.labels import (
    draw_boxes,
    font,
    layout_labels,
    letter_size,
    line_height,
    place_label,
    wrap,
)

NO_LABELS = np.zeros((0, 4))
TEXTS = ["red circle", "the small blue cross left of the dog", "zebra", "a", "traffic light"]


def area(places):
    return np.prod(places[:, 2:] - places[:, :2], axis=1)


def overlap(one, other):
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    return np.prod(np.clip(sides, 0, None), axis=-1)


def random_boxes(rng, count, size):
    corners = np.sort(rng.uniform(-0.1, 1.1, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4) * np.tile(size, 2)


@pytest.mark.parametrize("side", [64, 100, 448, 896, 2000, 4000])
@pytest.mark.parametrize("shape", [(1, 1), (1, 0.3), (0.3, 1)])
def test_labels_are_inside_and_legible_at_every_size(side, shape):
    rng = np.random.default_rng(side)
    size = tuple(round(side * share) for share in shape)
    boxes = random_boxes(rng, 8, size)
    texts = [TEXTS[i % len(TEXTS)] for i in range(8)]
    labels = layout_labels(boxes, texts, ["0.93"] * 8, size, letter_size(side))
    for label in labels:
        assert (label.place >= 0).all() and (label.place[2:] <= size).all()
        width, height = label.place[2:] - label.place[:2]
        # Every line is within its label.
        assert max(font(label.letters).getlength(line) for line in label.lines) <= width
        assert line_height(label.letters) * len(label.lines) <= height
        assert label.letters >= 7
    if min(size) >= 200:
        assert {label.letters for label in labels} == {letter_size(side)}
        assert all(label.lines[-1].endswith("0.93") for label in labels)


def test_letters_grow_with_the_picture_but_more_slowly():
    sizes = [letter_size(side) for side in (64, 448, 896, 2000, 4000)]
    assert sizes == sorted(sizes) and sizes[0] >= 9
    shares = [size / side for size, side in zip(sizes, (64, 448, 896, 2000, 4000))]
    assert shares == sorted(shares, reverse=True)
    # On a screen of 1000 pixels the letters of the largest picture are still ten pixels high.
    assert sizes[-1] / 4 >= 10


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(*[st.integers(0, 100)] * 4), max_size=12),
    st.integers(1, 60),
    st.integers(1, 40),
)
def test_a_label_covers_others_only_where_there_is_no_room(corners, width, height):
    boxes = np.sort(np.array(corners, float).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    placed = NO_LABELS
    for box in boxes:
        place = place_label(box, (width, height), (100, 80), placed)
        assert (place >= 0).all() and (place[2:] <= (100, 80)).all()
        assert (place[2:] - place[:2]).tolist() == [width, height]
        if overlap(place, placed).any():
            # By brute force: every place of the picture covers one.
            x, y = np.meshgrid(np.arange(101 - width), np.arange(81 - height))
            everywhere = np.stack([x, y, x + width, y + height], axis=-1).reshape(-1, 1, 4)
            assert overlap(everywhere, placed[None]).any(axis=1).all()
        placed = np.concatenate([placed, place[None]])


def test_labels_of_equal_boxes_are_beside_each_other():
    boxes = np.tile([100.0, 100, 300, 300], (20, 1))
    labels = layout_labels(boxes, TEXTS * 4, [""] * 20, (448, 448), 12)
    places = np.stack([label.place for label in labels])
    between = overlap(places[:, None], places[None])
    np.testing.assert_array_equal(between, np.diag(area(places)))


def test_the_first_label_stands_on_its_box():
    assert place_label(np.array([20, 40, 60, 70]), (30, 10), (100, 100), NO_LABELS).tolist() == [
        20, 30, 50, 40,
    ]  # fmt: skip
    # There is no room above, so below.
    assert place_label(np.array([20, 0, 60, 70]), (30, 10), (100, 100), NO_LABELS).tolist() == [
        20, 70, 50, 80,
    ]  # fmt: skip


def test_long_texts_end_in_dots_and_long_words_are_cut():
    lines = wrap("word " * 50, 12, 100, 2)
    assert len(lines) == 2 and lines[1].endswith(" ...")
    assert all(font(12).getlength(line) <= 100 for line in wrap("w" * 99 + " b", 12, 100, 2))
    assert wrap("", 12, 100, 2) == []
    (label,) = layout_labels([[0, 0, 9, 9]], ["w" * 500], ["0.50"], (300, 100), 12)
    assert label.lines[0].endswith("...") and label.lines[-1].endswith("0.50")
    assert label.place[2] <= 300


def test_boxes_are_lines_of_their_colour_on_their_sides():
    image = np.full((400, 500, 3), 90, np.uint8)
    colors = {"a": PALETTE[0], "b": PALETTE[1]}
    picture = draw_boxes(image, [[50, 60, 450, 350], [200, 200, 300, 320]], "ab", ["", ""], colors)
    assert picture.shape == image.shape and (image == 90).all()
    for (x1, y1, x2, y2), word in (((50, 60, 450, 350), "a"), ((200, 200, 300, 320), "b")):
        for y, x in ((y2, (x1 + x2) // 2), ((y1 + y2) // 2, x1), ((y1 + y2) // 2, x2)):
            assert tuple(picture[y, x]) == colors[word]
        assert tuple(picture[(y1 + y2) // 2 + 20, x1 + 12]) == (90, 90, 90)
        # A label: letters on a ground of the colour.
        assert (picture[y1 - 12 : y1 - 4, x1 : x1 + 14] == colors[word]).all(axis=2).sum() > 20


def test_small_boxes_and_the_first_of_equal_ones_are_on_top():
    image = np.full((200, 200, 3), 90, np.uint8)
    colors = dict(zip("abc", PALETTE))
    boxes = [[50, 50, 150, 150], [50, 50, 150, 150], [100, 50, 150, 190]]
    for order in ([0, 1, 2], [2, 0, 1]):
        words = ["abc"[i] for i in order]
        picture = draw_boxes(image, np.array(boxes)[order], words, [""] * 3, colors)
        assert tuple(picture[130, 50]) == colors["a"] and tuple(picture[130, 150]) == colors["c"]


def test_boxes_of_any_form_are_drawn_inside():
    image = np.full((60, 90, 3), 90, np.uint8)
    odd = [[-50, -50, 500, 500], [80, 50, 10, 5], [np.nan, 0, 9, np.inf], [40, 40, 40, 40]]
    picture = draw_boxes(image, odd, ["a"] * 4, ["1.00"] * 4, {"a": PALETTE[3]})
    assert picture.shape == image.shape
    assert (picture[30] == PALETTE[3]).all(axis=1).sum() >= 2
    np.testing.assert_array_equal(draw_boxes(image, NO_LABELS, [], [], {}), image)
