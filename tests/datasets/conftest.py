"""The preparation scripts as modules and as programs, and what every grounding file must pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fiber_d2.data import load_grounding_json
from fiber_d2.text import build_grounding_prompt, load_tokenizer

PREPARE = Path(__file__).resolve().parents[2] / "datasets" / "prepare"
# Last, so that no name of a script can hide a library.
sys.path.append(str(PREPARE))


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("shapes")


@pytest.fixture
def run_script():
    """Runs a script as a program of its own."""

    def run(name, *arguments):
        command = [sys.executable, str(PREPARE / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def write():
    """Writes json where no text is given; returns the path."""

    def write_file(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write_file


@pytest.fixture
def read_grounding(tokenizer):
    """The records of an MDETR-style file, after a prompt was built for every one of them."""

    def read(path):
        records = load_grounding_json(str(path), "images")
        assert records
        for record in records:
            spans = [annotation["tokens_positive"] for annotation in record["annotations"]]
            for targets in (spans, record.get("tokens_positive_eval", [])):
                prompt = build_grounding_prompt(tokenizer, record["caption"], targets)
                assert (prompt.positive_map.sum(1) > 0.99).all()
        return records

    return read


def words_of(record, spans):
    """What the spans of a record's caption read."""
    return [record["caption"][begin:end] for begin, end in spans]


@pytest.fixture
def spelled():
    return words_of


@pytest.fixture
def fails(capsys):
    """Asserts that a script ends with code 2, one line that has all the words, and no output."""

    def check(main, arguments, *words, output=None):
        assert main([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1, message
        for word in words:
            assert word in message, message
        assert output is None or not output.exists()

    return check


@pytest.fixture
def restarts(capsys):
    """Asserts that a script recovers from a killed run, leaves a finished file, and overwrites."""

    def check(main, arguments, output):
        arguments = [str(argument) for argument in arguments]
        assert main(arguments) == 0
        complete = output.read_text()
        output.unlink()
        (output.parent / f".{output.name}.partial").write_text(complete[:20])
        assert main(arguments) == 0
        assert output.read_text() == complete
        assert sorted(output.parent.glob(".*")) == []

        output.write_text("mine")
        capsys.readouterr()
        assert main(arguments) == 0
        assert "left alone" in capsys.readouterr().out and output.read_text() == "mine"
        assert main([*arguments, "--overwrite"]) == 0
        assert output.read_text() == complete

    return check
