"""What was typed, as queries and as pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.demo.questions import KINDS, understand
from fiber_d2.queries import Caption, Classes, Expression


def test_names():
    asked = understand(" red circle. blue  cross,\r\nred circle ;; ", "classes")
    assert asked.query == Classes(["red circle", "blue cross"])
    assert asked.pieces == [
        (" ", None),
        ("red circle", 0),
        (". ", None),
        ("blue  cross", 1),
        (",\n", None),
        ("red circle", 0),
        (" ;; ", None),
    ]


def test_sentence():
    asked = understand("A dog 🐕 chases the cat.", "caption")
    assert asked.query == Caption("A dog 🐕 chases the cat.")
    assert [(text, asked.query.words[i]) for text, i in asked.pieces if i is not None] == [
        (words, words) for words in asked.query.words
    ]


def test_expression():
    asked = understand("  the cup left of the plate\n", "expression")
    assert asked.query == Expression("  the cup left of the plate\n")
    assert asked.pieces == [("  ", None), ("the cup left of the plate", 0), ("\n", None)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", " \n", " . ,; "])
def test_nothing_to_look_for(text, kind):
    with pytest.raises(ValueError, match="nothing to look for"):
        understand(text, kind)


def test_other_kinds():
    with pytest.raises(ValueError, match="one of classes, caption, expression, not 'poem'"):
        understand("roses", "poem")


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60), kind=st.sampled_from(KINDS))
def test_pieces_are_the_text_and_name_the_targets(text, kind):
    try:
        asked = understand(text, kind)
    except ValueError:
        return
    assert "".join(piece for piece, _ in asked.pieces) == text.replace("\r\n", "\n")
    assert {i for _, i in asked.pieces if i is not None} == set(range(len(asked.query.words)))
    for piece, target in asked.pieces:
        if target is not None:
            assert " ".join(piece.split()) == " ".join(asked.query.words[target].split())
