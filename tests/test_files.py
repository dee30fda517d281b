"""Files that are whole or not there."""

from __future__ import annotations

import json

import pytest

from fiber_d2.files import replacing, save_json


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with replacing(path) as file:
        file.write(b"old")
        assert not path.exists()
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_changes_nothing(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json(tmp_path):
    path = tmp_path / "a.json"
    save_json({"ä": [1.5, None]}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1.5, None]}
    with pytest.raises(TypeError):
        save_json({1, 2}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1.5, None]}
