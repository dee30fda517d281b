"""The table of names, against the original's own list of names and shapes."""

import json
from pathlib import Path

import pytest

from fiber_d2.checkpoint.names import FIBER_TABLE, NameMap, is_unused, strip_prefixes

FIXTURES = Path(__file__).parents[1] / "fixtures" / "model"


def original_names(version):
    return json.loads((FIXTURES / f"state_dict_names_{version}.json").read_text())


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_every_original_name_has_one_home(version):
    rename, back = NameMap(FIBER_TABLE), NameMap(FIBER_TABLE).inverse
    used, unused = {}, []
    for name, *_ in original_names(version):
        ours = rename(name)
        if ours is None:
            unused.append(name)
            continue
        assert back(ours) == name
        assert not is_unused(name)
        used[name] = ours
    assert len(set(used.values())) == len(used)
    assert all(map(is_unused, unused))
    # 24 index buffers, position ids, the class convolution's two, five cell anchors.
    assert len(unused) == 24 + 1 + 2 + 5


@pytest.mark.parametrize("row", range(len(FIBER_TABLE)))
def test_every_row_of_the_table_is_needed(row):
    rename = NameMap([FIBER_TABLE[row]])
    # What prompt tuning adds is in its own checkpoints only (SPEC_DATA_EVAL 6.15).
    names = ["fusion_backbone.tunable_linear.weight", *(n for n, *_ in original_names("v3"))]
    assert any(map(rename, names))


def test_patterns_take_whole_names_and_whole_numbers():
    rename = NameMap([("a.{i}.x{j+2}.*", "b.{j}.y.{i}.*")])
    assert rename("a.3.x12.weight") == "b.10.y.3.weight"
    assert rename.inverse("b.10.y.3.weight") == "a.3.x12.weight"
    for other in (
        "a.3.x12.weights",
        "a.03.x12.bias",
        "a.3.x12.scale",
        "xa.3.x12.bias",
        "a.3.x.bias",
    ):
        assert rename(other) is None


def test_prefixes_of_wrappers():
    assert strip_prefixes("module.model.module.rpn.x") == "rpn.x"
    assert strip_prefixes("modulex.rpn") == "modulex.rpn"
