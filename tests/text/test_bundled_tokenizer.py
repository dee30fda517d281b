"""The tokenizer that ships with the package: its layout, its words, and where it comes from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    path = ROOT / "tools" / "train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(script):
    return Tokenizer.from_file(str(script.OUTPUT))


def test_the_script_makes_the_file(script, tokenizer):
    """Run tools/train_tokenizer.py after a change of the generator's words, or undo the change."""
    made = script.train_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    for text in [*list(script.corpus())[:200], "raccoon", "Some unseen Text, naïve 日本"]:
        assert made.encode(text).ids == tokenizer.encode(text).ids


def test_layout_of_ids(tokenizer):
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 4]
    assert 1000 <= tokenizer.get_vocab_size() <= 2000
    encoded = tokenizer.encode("red circle. blue square")
    assert encoded.tokens == ["<s>", "red", "Ġcircle", ".", "Ġblue", "Ġsquare", "</s>"]
    # Spaces belong to no token.
    assert encoded.offsets[1:-1] == [(0, 3), (4, 10), (10, 11), (12, 16), (17, 23)]
    pair = tokenizer.encode("red", "blue").tokens
    assert pair == ["<s>", "red", "</s>", "</s>", "blue", "</s>"]


def test_words_of_the_generator_are_one_token(script, tokenizer):
    words = script.shape_words()
    assert {"left", "right", "above", "below", "small", "red", "circles", "two"} <= set(words)
    long = {w: t for w in words if len(t := pieces(tokenizer, f" {w}")) != 1}
    assert not long


def test_common_words_are_few_tokens(tokenizer):
    for word in ("raccoon", "person", "traffic", "motorcycle", "jellyfish", "crosswalk"):
        assert len(pieces(tokenizer, f" {word}")) <= 4


def pieces(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).tokens


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=40))
def test_every_text_comes_back(text):
    bundled = ROOT / "fiber_d2" / "text" / "assets" / "shapes_tokenizer.json"
    tokenizer = Tokenizer.from_file(str(bundled))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert 3 not in ids  # <unk>
    if not any(name in text for name in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
