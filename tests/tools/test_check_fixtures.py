"""The fixture tool, as it is called: on the stored fixtures, and on copies that were changed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "check_fixtures.py"
FIXTURES = REPOSITORY / "tests" / "fixtures" / "data_eval"
SECTIONS = "a,b,d,e,f"


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def tool():
    """The tool as a module; its sections are importable through it."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("check_fixtures", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture
def section_class(tool):
    from data_eval.common import Section

    return Section


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "fixtures"
    shutil.copytree(FIXTURES, folder)
    return folder


def change(folder, name, function):
    path = folder / name
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


@pytest.mark.slow
def test_the_stored_fixtures_pass(tmp_path):
    report = tmp_path / "new" / "report.json"
    result = run(FIXTURES, "--sections", SECTIONS, "--json", report, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert [line[0] for line in lines] == SECTIONS.split(",")
    assert all("passed" in line and line.endswith(" 0 failed") for line in lines)
    content = json.loads(report.read_text())
    assert list(content) == SECTIONS.split(",")
    for line, entry in zip(lines, content.values()):
        assert entry["failed"] == 0 and entry["failures"] == [] and entry["checked"] > 10
        assert f"{entry['checked']} checked" in line
    assert [path.name for path in report.parent.iterdir()] == ["report.json"]


def _shift_span(content):
    content["eval_prompts"][1]["expected"][0]["char_spans"][3][0][1] += 1


def _merge_differently(content):
    content["merge_boxes"][4]["merged"][0][2] += 1


def _move_a_token(content):
    case = next(i for i, case in enumerate(content["cases"]) if case["expected"]["nnz"])
    content["cases"][case]["expected"]["nnz"][0][2] *= 1.001
    content["cases"][case]["n_tokens"] += 1


def _better_recall(content):
    content["expected"]["merged"]["5"]["all"] += 1e-3


def _lower_precision(content):
    name = next(iter(content["expected"]["giou_0_6"]))
    content["expected"]["giou_0_6"][name][0] += 1e-3


@pytest.mark.slow
def test_changed_expectations_fail_and_are_named(copy, tmp_path):
    changes = {
        "a": ("a_flickr.json", _better_recall, "merged, all at k=5: found"),
        "b": ("b_refexp.json", _lower_precision, "giou_0_6, "),
        "d": ("d_prompts.json", _shift_span, "eval_prompts[1], char_spans: found"),
        "e": ("e_positive_map.json", _move_a_token, "n_tokens: found"),
        "f": ("f_merge_and_boxes.json", _merge_differently, "merge_boxes[4], merged: found"),
    }
    for name, function, _ in changes.values():
        change(copy, name, function)
    report = tmp_path / "report.json"
    result = run(copy, "--sections", SECTIONS, "--json", report)
    assert result.returncode == 1 and not result.stderr
    content = json.loads(report.read_text())
    for letter, (_, _, message) in changes.items():
        failures = content[letter]["failures"]
        assert len(failures) == content[letter]["failed"] == (2 if letter == "e" else 1)
        assert message in failures[0] and f"     {failures[0]}" in result.stdout
        assert content[letter]["checked"] > 10


@pytest.mark.slow
def test_missing_broken_and_empty_files_fail(copy):
    (copy / "a_flickr.json").unlink()
    (copy / "b_refexp.json").write_text("{")
    (copy / "tokenizer.json").unlink()
    change(copy, "f_merge_and_boxes.json", dict.clear)
    result = run(copy, "--sections", SECTIONS)
    assert result.returncode == 1 and not result.stderr
    lines = result.stdout.splitlines()
    assert [line[0] for line in lines[::2]] == SECTIONS.split(",")
    assert all("FAILED, 0 checked, 1 failed" in line for line in lines[::2])
    assert "a_flickr.json is missing in" in lines[1]
    assert "b_refexp.json is not JSON" in lines[3]
    assert "tokenizer.json" in lines[5] and "tokenizer.json" in lines[7]
    assert "KeyError: 'merge_boxes'" in lines[9]


@pytest.mark.slow
def test_a_section_without_cases_fails(copy):
    change(copy, "e_positive_map.json", lambda content: content["cases"].clear())
    result = run(copy, "--sections", "e")
    assert result.returncode == 1
    assert "nothing was checked" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FIXTURES, "--sections", "a,y"), "error: unknown section 'y': there are a, b, c, d, e, f"),
        ((FIXTURES, "--sections", ""), "error: unknown section ''"),
        ((FIXTURES / "nowhere",), "error: there is no directory"),
        ((), "error: the following arguments are required: DIRECTORY"),
    ],
)
def test_bad_arguments(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1


def test_all_sections_are_checked_by_default(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line[0] for line in lines] == tool.known_sections()
    assert set(SECTIONS.split(",")) <= set(tool.known_sections())
    assert all("FAILED" in line for line in lines)


def test_comparisons(section_class):
    section = section_class("x")
    good = [
        section.equal("a", np.array([1, 2]), [1, 2]),
        section.equal("a", (1, ["b"]), [1, ["b"]]),
        section.equal("a", {"k": torch.tensor([1.5])}, {"k": [1.5]}),
        section.close("a", torch.tensor([1.0]), [1.0005], 1e-3),
        section.close("a", [np.inf], [np.inf], 0.0),
        section.close("a", np.zeros((0, 4)), [], 0.0),  # a list cannot tell
        section.true("a", [1]),
        section.raises("a", lambda: [][0], IndexError),
    ]
    assert all(good) and section.checked == len(good) and not section.failures
    bad = [
        section.equal("lists", [1, [2, 3]], [1, [2, 4]]),
        section.equal("lengths", [1], [1, 2]),
        section.equal("keys", {"a": 1}, {"b": 1}),
        section.equal("truth", True, 1),
        section.close("nan", [np.nan], [np.nan], 1.0),
        section.close("shape", [[1.0]], [1.0], 1.0),
        section.close("text", ["a"], [1.0], 1.0),
        section.close("value", [[0.0, 2.0]], [[0.0, 1.0]], 0.5),
        section.true("false", 0),
        section.raises("nothing", lambda: 1, ValueError),
        section.raises("other", lambda: [][0], KeyError),
    ]
    assert not any(bad)
    assert section.checked == len(good) + len(bad) and len(section.failures) == len(bad)
    texts = dict(failure.split(": ", 1) for failure in section.failures)
    assert texts["lists"] == "found 3, expected 4 at [1][1]"
    assert texts["value"] == "found 2, expected 1 at [0, 1] (1 of 2 beyond 0.5)"
    assert "raised IndexError" in texts["other"] and "expected KeyError" in texts["other"]


def test_an_exception_fails_its_case_only(section_class):
    section = section_class("x")
    with section.case("outer"):
        with section.case("inner"):
            section.true("fine", True)
            raise RuntimeError("x" * 500)
        section.true("goes on", False)
    assert section.checked == 3 and len(section.failures) == 2
    assert section.failures[0].startswith("outer, inner: RuntimeError: xxx")
    assert len(section.failures[0]) == 200
    assert section.failures[1] == "outer, goes on: is not so"
