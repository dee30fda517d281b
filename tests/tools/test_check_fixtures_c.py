"""Section c of the fixture check: it passes on the reference and notices changes."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures" / "data_eval"
NAMES = ("c_lvis_gt.json", "c_lvis_detections.npz", "c_lvis_expected.json")


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module("data_eval.section_c").check


@pytest.fixture
def copy(tmp_path):
    for name in NAMES:
        shutil.copy(FIXTURES / name, tmp_path)
    return tmp_path


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def keep_one_table(content):
    content["expected"] = {"fixed_ap_topk25": content["expected"]["fixed_ap_topk25"]}


@pytest.mark.slow
def test_as_a_program(tmp_path):
    tool, report = REPOSITORY / "tools" / "check_fixtures.py", tmp_path / "report.json"
    command = [sys.executable, str(tool), str(FIXTURES), "--sections", "c", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())["c"]
    # 6 tables of 13 metrics, 5 orders, both ways to score.
    assert found["checked"] > 6 * 13 * 5 * 2 and not found["failed"]


def test_other_expectations_are_noticed(check, copy):
    def edit(content):
        tables = content["expected"]
        content["expected"] = {
            "fixed_ap_topk25": {**tables["fixed_ap_topk25"], "APr": -1},
            "lvis_package_maxdets20": tables["lvis_package_maxdets20"],
            "mask_ap": {},
        }
        content["expected"]["lvis_package_maxdets20"]["ARm@20"] += 1e-8
        content["n_detections"] += 1

    change(copy / NAMES[2], edit)
    failures = check(copy).failures
    assert failures[0].startswith("detections: ")
    assert failures[1].startswith("fixed_ap_topk25, in class chunks, APr: found 0.01")
    assert failures[2].startswith("fixed_ap_topk25, evaluator, in class chunks, APr: found 0.01")
    assert sum("maxdets20" in line and "ARm@20: found" in line for line in failures) == 10
    assert failures[-1] == "mask_ap: ValueError: no such kind of AP is known"
    assert len(failures) == 22


def test_other_detections_are_noticed(check, copy):
    with np.load(copy / NAMES[1]) as content:
        found = dict(content)
    found["scores"] = found["scores"][::-1]
    np.savez(copy / NAMES[1], **found)
    change(copy / NAMES[2], keep_one_table)
    assert check(copy).failures


def test_classes_without_a_chunk_are_noticed(check, copy):
    change(copy / NAMES[2], keep_one_table)
    change(copy / NAMES[2], lambda content: content["class_chunks"].pop())
    failures = check(copy).failures
    assert "in class chunks holds every detection once: is not so" in failures


@pytest.mark.parametrize("name", NAMES)
def test_missing_files(check, copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        check(copy)
