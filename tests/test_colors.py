import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.colors import PALETTE, WordColors
from fiber_d2.labels import LABEL_INK

WORDS = ["cat", "dog", "traffic light", "the red circle", "blue cross", "Öl", "zebra", "person"]


def linear(colors):
    shares = np.asarray(colors, float) / 255
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def oklab(colors):
    """Ottosson's OKLab, in which equal distances look about equally different."""
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear(colors) @ np.transpose(to_lms)) @ np.transpose(to_lab)


def test_colours_of_the_palette_are_far_apart():
    lab = oklab(PALETTE)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distances[~np.eye(len(PALETTE), dtype=bool)].min() > 0.14


def test_labels_can_be_read_on_every_colour():
    luminance = linear([*PALETTE, LABEL_INK]) @ [0.2126, 0.7152, 0.0722]
    contrast = (luminance[:-1] + 0.05) / (luminance[-1] + 0.05)
    # WCAG 2.1: 4.5 for small letters.
    assert contrast.min() > 4.5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("bcxyz", min_size=1), max_size=16), st.randoms())
def test_words_of_a_picture_have_different_colours_in_whatever_order(words, random):
    colors = WordColors().of(words)
    assert len(set(colors.values())) == len(set(words))
    shuffled = random.sample(words, len(words))
    assert WordColors().of(shuffled) == colors
    assert WordColors([shuffled]).of(words) == colors


def test_all_words_of_a_group_differ():
    names = [f"class {number}" for number in range(len(PALETTE))]
    assert len(set(WordColors([names]).of(names).values())) == len(PALETTE)
    more = [f"class {number}" for number in range(3 * len(PALETTE))]
    counts = np.unique(list(WordColors([more]).of(more).values()), axis=0, return_counts=True)[1]
    assert counts.tolist() == [3] * len(PALETTE)


def test_a_word_has_one_colour_in_all_pictures_and_its_neighbours_have_others():
    rng = np.random.default_rng(0)
    vocabulary = [f"word {number}" for number in range(200)]
    pictures = [rng.choice(vocabulary, 5, replace=False).tolist() for _ in range(150)]
    run, other_order = WordColors(pictures), WordColors(pictures[::-1])
    everywhere = run.of(vocabulary)
    alone = 0
    for words in pictures:
        found = run.of(words)
        assert found == {word: everywhere[word] for word in words} == other_order.of(words)
        assert len(set(found.values())) == len(words)
        alone += sum(run.of([word]) == WordColors().of([word]) for word in words)
    # Few have to give up their own colour.
    assert alone > 0.6 * 5 * len(pictures)


def test_a_new_word_leaves_the_known_ones_theirs():
    known = WordColors([WORDS])
    new = [f"new {number}" for number in range(len(PALETTE) - len(WORDS))]
    colors = known.of([*new, *WORDS])
    assert {word: colors[word] for word in WORDS} == known.of(WORDS)
    assert len(set(colors.values())) == len(PALETTE)


@pytest.mark.parametrize("same", ["Cat", "the cat", "A  cat", " cat "])
def test_case_and_articles_make_no_other_word(same):
    colors = WordColors([WORDS]).of(["cat", same])
    assert colors["cat"] == colors[same]
    assert len({*WordColors().of(["a", "the", "an"]).values()}) == 3


def test_the_own_colour_depends_on_letters_only():
    for word in ("cat", "traffic light", "öl"):
        number = zlib.crc32(word.encode()) % len(PALETTE)
        assert WordColors().of([word]) == {word: PALETTE[number]}
