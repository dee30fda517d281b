"""What the preparation scripts share."""

from __future__ import annotations

import json

import common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PIECES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(PIECES, st.sampled_from([" ", ". ", ""]))
def test_spans_spell_the_pieces(pieces, separator):
    text, spans = common.join_with_spans(pieces, separator)
    assert [text[begin:end] for begin, end in spans] == pieces
    assert text == separator.join(pieces)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.lists(st.integers() | st.text(max_size=5))))
def test_written_json_reads_the_same(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "new" / "a.json"
    common.write_json(path, content)
    assert json.loads(path.read_text()) == common.read_json(path) == content


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    common.write_json(path, {"images": [1]})
    with pytest.raises(TypeError):
        common.write_json(path, {"images": [2, object()]})
    assert json.loads(path.read_text()) == {"images": [1]}


def test_messages_name_file_and_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.json does not exist. Get it"):
        common.read_json(tmp_path / "a.json", "Get it.")
    (tmp_path / "a.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="a.json is damaged"):
        common.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.json is not UTF-8"):
        common.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"images": [1], "b": 2}')
    with pytest.raises(ValueError, match="a.json: an entry of 'images' is no json object"):
        common.read_coco(tmp_path / "a.json", "images")
    with pytest.raises(ValueError, match="a.json .* no list 'b'"):
        common.read_coco(tmp_path / "a.json", "b")
    with pytest.raises(ValueError, match="^Here has no b, c"):
        common.fields({"a": 1}, ("a", "b", "c"), "Here")


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, None], [1, 2, 3, True], 5])
def test_what_is_no_box(box):
    with pytest.raises(ValueError, match="^Here has the box"):
        common.checked_box(box, "Here")
    with pytest.raises(ValueError, match="^Here has the box"):
        common.checked_box([0, 0, float("nan"), 1], "Here")


def test_boxes():
    assert common.checked_box([1.0, 2.5, 3, 4.0], "") == [1, 2.5, 3, 4]
    assert common.clip_box([-5, 10, 30, 100], 20, 50) == [0, 10, 20, 40]
    assert not common.has_extent(common.clip_box([25, 10, 5, 5], 20, 50))
    for size in ([5], [5, 0], [5, "6"], [5, 6.5]):
        with pytest.raises(ValueError, match="^Here has the size"):
            common.checked_size(size, "Here")
    assert common.checked_text(" a \n b ", "") == "a b"
    with pytest.raises(ValueError, match="^Here has None"):
        common.checked_text(None, "Here")


def test_caption_entries_do_not_share_what_can_change():
    output = common.GroundingFile("test")
    output.add_caption("a dog", file_name="a.jpg", width=4, height=3, original_id=7)
    output.add_box([0, 0, 2, 3], [(0, 5)])
    output.add_caption("a cat", file_name="b.jpg", width=4, height=3)
    output.add_box([0, 0, 1, 1], [(0, 1), (2, 5)], area=0.5)
    assert [image["id"] for image in output.images] == [1, 2]
    assert output.images[0]["original_id"] == 7 and output.images[0]["tokens_negative"] == [[0, 5]]
    first, second = output.annotations
    assert (first["image_id"], first["area"], first["tokens_positive"]) == (1, 6, [[0, 5]])
    assert (second["id"], second["image_id"], second["area"]) == (2, 2, 0.5)
