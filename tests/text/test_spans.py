"""The positive map against the stored reference and against the rule written out token by token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiber_d2.text import character_tokens, load_tokenizer, spans_to_positive_map

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data_eval"
CASES = json.loads((FIXTURES / "e_positive_map.json").read_text())["cases"]
TOKENIZER = load_tokenizer(FIXTURES / "tokenizer.json")


def encode(caption: str, **kwargs):
    return TOKENIZER(caption, return_offsets_mapping=True, **kwargs)


def marked_tokens(encoding, spans, width) -> set[int]:
    """The rule with the tokenizer library's own look-up, one span at a time."""

    def look_up(positions):
        for position in positions:
            token = encoding.char_to_token(position) if position >= 0 else None
            if token is not None:
                return token
        return None

    marked: set[int] = set()
    for begin, end in spans:
        first = look_up([begin, begin + 1, begin + 2])
        last = look_up([end - 1, end - 2, end - 3])
        if first is not None and last is not None:
            marked |= set(range(first, last + 1))
    return {token for token in marked if token < width}


@pytest.mark.parametrize("index", range(len(CASES)))
def test_agrees_with_the_stored_maps(index):
    case = CASES[index]
    cut = {"truncation": True, "max_length": 256} if case["truncated_to_256"] else {}
    encoding = encode(case["caption"], **cut)
    assert len(encoding["input_ids"]) == case["n_tokens"]
    found = spans_to_positive_map(encoding["offset_mapping"], case["tokens_positive"], 256)
    expected = torch.zeros(case["expected"]["shape"])
    for row, column, value in case["expected"]["nnz"]:
        expected[row, column] = value
    # The stored rows are divided by (count + 1e-6) instead of the count.
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=0)
    assert (found > 0).sum(dim=1).tolist() == case["collated_binary_row_sums"]


WORDS = st.text(alphabet="ab é日🐶.,'-_", min_size=0, max_size=40)


@given(WORDS, st.data())
@settings(max_examples=200, deadline=None)
def test_agrees_with_the_rule_token_by_token(caption, data):
    border = st.integers(0, len(caption))
    target = st.lists(st.tuples(border, border).map(sorted), max_size=3)
    spans = data.draw(st.lists(target, max_size=4))
    encoding = encode(caption)
    width = data.draw(st.integers(1, len(encoding["input_ids"]) + 3))
    found = spans_to_positive_map(encoding["offset_mapping"], spans, width)
    assert found.shape == (len(spans), width) and found.dtype == torch.float32
    for row, target_spans in zip(found, spans):
        expected = marked_tokens(encoding, target_spans, width)
        assert set(torch.nonzero(row).flatten().tolist()) == expected
        if expected:
            assert row.sum().item() == pytest.approx(1.0, abs=1e-6)
            assert len(row[row > 0].unique()) == 1


@given(WORDS)
@settings(max_examples=100, deadline=None)
def test_character_tokens_are_the_first_that_cover_each_character(caption):
    encoding = encode(caption)
    found = character_tokens(encoding["offset_mapping"], len(caption))
    expected = [encoding.char_to_token(i) for i in range(len(caption))]
    assert found.tolist() == [-1 if token is None else token for token in expected]


def test_by_hand():
    # "<s> red _ circle </s>": the space at 3 belongs to no token.
    offsets = [(0, 0), (0, 3), (4, 10), (0, 0)]
    spans = [[(0, 3)], [(3, 10)], [(0, 4)], [(0, 10)], [], [(3, 4)], [(0, 3), (0, 10)]]
    expected = [
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 1, 0, 0],
        [0, 0.5, 0.5, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],  # from "c" back to "d": nothing lies in between
        [0, 0.5, 0.5, 0],
    ]
    assert spans_to_positive_map(offsets, spans).tolist() == expected


def test_nothing_to_mark():
    assert spans_to_positive_map(np.zeros((0, 2)), []).shape == (0, 0)
    assert spans_to_positive_map([(0, 0), (0, 0)], [[(0, 0)]]).tolist() == [[0, 0]]
