"""Every way to name a tokenizer, and what is said where there is none."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fiber_d2.text import load_tokenizer

FILE = Path(__file__).parents[1] / "fixtures" / "data_eval" / "tokenizer.json"
TEXT = "The small red circle left of 日本"


def test_bundled_tokenizer_has_whole_words_and_trimmed_offsets():
    tokenizer = load_tokenizer("shapes")
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    encoded = tokenizer("red circle. red", return_offsets_mapping=True)
    assert encoded["offset_mapping"] == [(0, 0), (0, 3), (4, 10), (10, 11), (12, 15), (0, 0)]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT


def test_file_and_folder_are_the_same(tmp_path):
    expected = load_tokenizer(FILE)(TEXT, return_offsets_mapping=True)
    (tmp_path / "tokenizer.json").write_bytes(FILE.read_bytes())
    assert dict(load_tokenizer(str(tmp_path))(TEXT, return_offsets_mapping=True)) == dict(expected)


def test_vocabulary_and_merges_of_roberta(tmp_path):
    stored = json.loads(FILE.read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]))
    pairs = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    expected = load_tokenizer(FILE)(TEXT, return_offsets_mapping=True)
    assert dict(load_tokenizer(tmp_path)(TEXT, return_offsets_mapping=True)) == dict(expected)


def test_stored_truncation_and_padding_are_not_applied(tmp_path):
    stored = json.loads(FILE.read_text())
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    expected = load_tokenizer(FILE)(TEXT)["input_ids"]
    assert load_tokenizer(tmp_path)(TEXT)["input_ids"] == expected


@pytest.mark.parametrize("name", ["no/such/folder/here", "./nothing", "/nothing", "missing.json"])
def test_missing_path(name):
    with pytest.raises(FileNotFoundError, match="give the path of a tokenizer.json"):
        load_tokenizer(name)


def test_hub_name_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(
        FileNotFoundError, match="neither as a path nor in the local .*roberta-base"
    ):
        load_tokenizer("no-such-owner/no-such-tokenizer")
    assert time.monotonic() - started < 5


def test_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match="http://127.0.0.1:9 cannot be reached"):
        load_tokenizer("no-such-owner/no-such-tokenizer")
    assert time.monotonic() - started < 10


def test_empty_folder_and_bad_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither tokenizer.json nor vocab.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
