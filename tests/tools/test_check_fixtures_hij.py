"""Sections h, i and j of the fixture check: they pass on the reference and notice changes."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures" / "data_eval"


@pytest.fixture
def check(monkeypatch):
    """Checks a section of a directory."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))

    def run(letter, directory):
        return importlib.import_module(f"data_eval.section_{letter}").check(Path(directory))

    return run


@pytest.fixture
def copy(tmp_path):
    """A copy of the reference of the three sections."""
    for name in ("h_fewshot.json", "j_samplers.json"):
        shutil.copy(FIXTURES / name, tmp_path)
    shutil.copytree(FIXTURES / "i_tsv", tmp_path / "i_tsv")
    return tmp_path


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("letter", "least"), [("h", 90), ("i", 150), ("j", 60)])
def test_reference(check, letter, least):
    section = check(letter, FIXTURES)
    assert section.failures == [] and section.checked >= least


def test_as_a_program(tmp_path):
    tool, report = REPOSITORY / "tools" / "check_fixtures.py", tmp_path / "report.json"
    command = [sys.executable, str(tool), str(FIXTURES), "--sections", "h,i,j", "--json"]
    done = subprocess.run([*command, str(report)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert list(found) == ["h", "i", "j"]
    assert all(entry["checked"] and not entry["failed"] for entry in found.values())


def test_h_notices_another_selection(check, copy):
    def edit(content):
        expected = content["cases"][0]["expected"]
        expected["CocoGrounding_shot1_seed0"].reverse()
        expected["COCODataset_shot1_seed3"].pop()
        expected["Other_shot1_seed3"] = []

    change(copy / "h_fewshot.json", edit)
    failures = check("h", copy).failures
    assert len(failures) == 3
    assert failures[0].startswith("case 0, CocoGrounding_shot1_seed0, image ids: found")


def test_h_holds_selections_with_sparse_ids_against_the_rule(check, copy, monkeypatch):
    section = importlib.import_module("data_eval.section_h")
    original = section.few_shot_subset
    monkeypatch.setattr(section, "few_shot_subset", lambda *a, **k: original(*a, **k)[1:])

    def edit(content):
        for case in content["cases"]:
            expected = case["expected"]
            case["expected"] = {k: v for k, v in expected.items() if v == "IndexError"}

    change(copy / "h_fewshot.json", edit)
    result = check("h", copy)
    assert len(result.failures) >= 12
    assert all("against the rule" in failure for failure in result.failures)


def test_i_notices_every_kind_of_change(check, copy):
    keys = ["line", "key", "int_image_id", "rgb_sha1", "n_after_remove_empty"]

    def edit(content):
        for name in content:
            content[name]["length"] += 1
            content[name]["ind_to_class"][1][1] = "other"
        items = content["train.yaml"]["items"]
        for key in keys:
            items[1][key] = -1
        items[2]["boxes_clipped_keep_empty"][0][0] += 1
        items[3]["labels"].reverse()
        items[5]["img_info"]["width"] += 1

    change(copy / "i_tsv" / "expected.json", edit)
    text = "\n".join(check("i", copy).failures)
    whats = ("length", "classes", "line", "key", "image id", "pixels", "boxes that are not empty")
    whats += ("boxes, inclusive", "boxes of the record", "labels", "size")
    for what in whats:
        assert f"train.yaml, {what}:" in text or f", {what}:" in text, what


def test_i_names_the_broken_row(check, copy):
    path = copy / "i_tsv" / "images.tsv"
    path.write_bytes(path.read_bytes().replace(b"9003\tiVBOR", b"9003\t!!!!!"))
    failures = check("i", copy).failures
    assert failures and all("Row 3 of" in failure for failure in failures)


def test_j_notices_another_order(check, copy):
    def edit(content):
        content["distributed"][0]["per_rank"][0].reverse()
        content["grouped"][0]["batches"].reverse()
        content["grouped"][1]["group_ids"][0] = 0
        content["iteration_based"][1]["batches"].pop()

    change(copy / "j_samplers.json", edit)
    failures = check("j", copy).failures
    starts = ["distributed 0, indices", "grouped 0, batches", "grouped 1, ", "iteration_based 1, "]
    assert all(any(failure.startswith(start) for failure in failures) for start in starts)


@pytest.mark.parametrize("letter", ["h", "i", "j"])
def test_missing_files(check, tmp_path, letter):
    with pytest.raises(FileNotFoundError):
        check(letter, tmp_path)
