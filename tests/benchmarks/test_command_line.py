"""The list of benchmarks, and the tables of the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        **options,
    )


def test_every_script_is_listed_with_what_it_measures():
    done = run(check=True)
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()[2:]}
    runnable = {
        path.stem
        for path in (REPOSITORY / "benchmarks").glob("*.py")
        if "argparse.ArgumentParser(" in path.read_text() or "sys.exit(main(" in path.read_text()
    } - {"__main__", "comparison"}
    assert set(listed) == runnable >= {"model", "chunks", "training_step", "deform_conv", "table"}
    assert all(len(about) > 20 for about in listed.values())


def test_an_unknown_name_is_an_error_that_lists_the_names():
    done = run("modell")
    assert done.returncode == 2
    assert "'modell'" in done.stderr and "training_step" in done.stderr


def test_a_script_gets_its_options():
    done = run("table", "--help", check=True)
    assert "--check" in done.stdout


@pytest.mark.slow
def test_compiled_and_not_are_compared(load, tmp_path):
    """With a backend that compiles nothing."""
    out = tmp_path / "compiled.json"
    run("compiled", "--backend=eager", "--cases=quickstart", "--repeats=1", f"--out={out}")
    report = json.loads(out.read_text())
    assert report["command"].startswith("python -m benchmarks compiled --backend=eager ")
    found = report["results"]["quickstart"]
    assert max(found["largest_relative_differences"].values()) < 1e-5
    assert found["first_pass_seconds"] > found["seconds"]["eager"]["median"] > 0
    table = load("table").compiled_table(report)
    assert "| quickstart | 256x320 |" in table and "| as it is, s | eager, s |" in table


def test_tables_of_the_documentation_are_those_of_the_results(load):
    table = load("table")
    document = table.DOCUMENT.read_text("utf-8")
    assert table.render(document) == document, "run `python -m benchmarks table`"
    places = table.PLACE.findall(document)
    assert {name for _, name, _ in places} == set(table.TABLES)


def test_tables_say_what_was_measured_and_what_was_not(load, tmp_path):
    table = load("table")
    document = "before\n<!-- table: flickr_scoring -->\nold\n<!-- end of table -->\nafter\n"
    assert "Not measured yet: `python -m benchmarks flickr_scoring`" in table.render(
        document, tmp_path
    )
    report = {
        "command": "python benchmarks/flickr_scoring.py",
        "machine": {"cpu": "Some", "cpu_count": 2, "torch": "2.1"},
        "cpu_seconds": {"ours": {"median": 0.5, "min": 0.25, "max": 1.0}},
    }
    (tmp_path / "flickr_scoring.json").write_text(json.dumps(report))
    written = table.render(document, tmp_path)
    assert "| ours | 0.50 (0.25..1.00) |" in written and "old" not in written
    assert "Some, 2 processors, torch 2.1. `python benchmarks/flickr_scoring.py`" in written
    assert written.startswith("before\n") and written.endswith("after\n")
    assert table.render(written, tmp_path) == written
    with pytest.raises(ValueError, match="no table 'other'"):
        table.render(document.replace("flickr_scoring", "other"), tmp_path)
