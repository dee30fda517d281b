"""``fiber-d2 export``: mistakes end it before any work, with one line."""

import json
import sys

import pytest

from fiber_d2.commands import export as command
from fiber_d2.export.description import read_description


@pytest.fixture
def run(tiny, tmp_path, capsys):
    """``run(*arguments) -> (exit status, stderr)``."""

    def run(*arguments, output=tmp_path / "out"):
        model = ("--config", str(tiny.config), "--weights", str(tiny.weights))
        try:
            code = command.main([*model, "--output", str(output), *arguments], "fiber-d2 export")
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--format", "tflite"], "invalid choice: 'tflite'"),
        (["--opset", "13"], "opset is 13, but operator needs 19 or later"),
        (["--opset", "19", "--deform-conv", "grid_sample"], "grid_sample needs 20 or later"),
        (["--format", "torch", "--int8"], "int8 is for the format onnx"),
        (["--config", "quickstop"], "neither a file"),
        (["--weights", "absent.pth"], "absent.pth"),
    ],
)
def test_arguments_that_do_not_fit(run, arguments, message):
    code, err = run(*arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, err = run("--format", "torch", output=tmp_path / "file")
    assert code == 2 and f"The output folder {tmp_path / 'file'} cannot be written" in err


def test_a_missing_library_is_named_with_what_brings_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, err = run()
    assert code == 2 and "needs the library onnx" in err and "fiber_d2[export]" in err


def test_folders_that_hold_no_exported_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no exported model, it has no export.json"):
        read_description(tmp_path)
    path = tmp_path / "export.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_description(tmp_path)
    path.write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="another version"):
        read_description(tmp_path)
