"""Section k of the fixture check: it passes on the reference and notices changes."""

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
    """Checks a directory."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("data_eval.section_k").check


@pytest.fixture
def change(tmp_path):
    """Writes a changed copy of the reference and returns its directory."""
    shutil.copy(FIXTURES / "k_tta.json", tmp_path)

    def edit(function):
        path = tmp_path / "k_tta.json"
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))
        return tmp_path

    return edit


def test_reference_as_a_program(tmp_path):
    tool, report = REPOSITORY / "tools" / "check_fixtures.py", tmp_path / "report.json"
    command = [sys.executable, str(tool), str(FIXTURES), "--sections", "k", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())["k"]
    assert found["checked"] >= 39 and found["failures"] == []


def test_every_kind_of_change_is_noticed(check, change):
    def edit(content):
        first, second, third = (case["expected"] for case in content["merge"][:3])
        first["boxes"][0][2] += 0.01
        second["scores"][1] += 1e-4
        third["labels"][0] += 1
        content["merge"][4]["special_nms"] = "other"
        content["scale_range_filter"][0]["kept"].pop()

    failures = check(change(edit)).failures
    starts = ("merge[0], boxes", "merge[1], scores", "merge[2], labels", "merge[4]: ValueError")
    starts += ("scale_range_filter[0], kept",)
    assert len(failures) == len(starts)
    assert all(failure.startswith(start) for failure, start in zip(failures, starts))


def test_classes_come_in_the_order_they_are_selected(check, change):
    def edit(content):
        for case in content["merge"]:
            if not case["select_classes"]:
                continue
            case["select_classes"].reverse()
            expected = case["expected"]
            wanted = case["select_classes"]
            order = sorted(
                range(len(expected["labels"])), key=lambda i: wanted.index(expected["labels"][i])
            )
            for name, values in expected.items():
                expected[name] = [values[i] for i in order]

    assert check(change(edit)).failures == []


def test_nothing_to_merge(check, change):
    def edit(content):
        for case in content["merge"]:
            case["boxes"], case["scores"], case["labels"] = [], [], []
            case["expected"] = {"boxes": [], "scores": [], "labels": []}

    assert check(change(edit)).failures == []


def test_missing_file(check, tmp_path):
    with pytest.raises(FileNotFoundError):
        check(tmp_path)
