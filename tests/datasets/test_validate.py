"""``datasets/validate.py`` as it is typed: exit codes, messages, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fiber_d2.data.shapes import prepare_shapes

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "datasets" / "validate.py"
COMMAND = [sys.executable, str(SCRIPT)]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def run(*arguments, cwd=None, **env):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=environment(**env),
    )


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def data(tmp_path):
    """``(content, annotation file, image root)`` of four images with a box each."""
    root = tmp_path / "images"
    root.mkdir()
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(4):
        pixels = generator.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.jpg")
        images.append({"id": index, "file_name": f"{index}.jpg", "width": 40, "height": 30})
        box = {"bbox": [4, 6, 10, 12], "category_id": 1, "iscrowd": 0}
        annotations.append({"id": index + 1, "image_id": index, **box})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "dog"}],
    }
    return content, write(tmp_path / "good.json", content), root


def test_good_data(data, tmp_path):
    _, path, root = data
    report = tmp_path / "reports" / "report.json"
    arguments = ("--coco-json", path, "--image-root", root, "--json", report)
    done = run(*arguments, HF_HOME=str(tmp_path))  # an empty cache of tokenizers
    assert done.returncode == 0, done.stderr
    assert "good.json (detection): 4 images, 4 annotations, 1 class\n" in done.stdout
    assert "0 errors, 0 warnings, 1 note" in done.stdout
    assert "roberta-base is not here" in done.stderr and "Traceback" not in done.stderr
    content = json.loads(report.read_text())
    assert content["complete"] and content["counts"] == {"error": 0, "warning": 0, "info": 1}
    assert content["sources"][0]["classes"] == ["dog"] and content["repairs"] is None


def test_damage_is_named_and_repaired(data, tmp_path):
    content, _, root = data
    os.remove(root / "3.jpg")
    content["annotations"][0]["bbox"] = [30, 6, 20, 12]
    content["annotations"][1]["bbox"] = [30, 6, 0, 12]
    path, out, report = (tmp_path / f"{name}.json" for name in ("damaged", "fixed", "report"))
    before = write(path, content).read_bytes()
    options = ("--coco-json", path, "--image-root", root, "--tokenizer", "shapes")
    done = run(*options, "--fix", out, "--json", report, "--workers", 2)
    assert done.returncode == 1 and done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["image-missing", "error", "1"] in rows and ["box-beyond", "warning", "1"] in rows
    assert "image 1 (1.jpg) annotation 2: bbox [30, 6, 0, 12]" in done.stdout
    assert "2 errors, 1 warning" in done.stdout
    assert path.read_bytes() == before
    found = json.loads(report.read_text())
    assert found["checks"]["box-empty"]["count"] == 1 and found["remaining"] == []
    assert found["repairs"]["box-dropped"] == 1 and found["repairs"]["image-dropped"] == 1
    offender = next(f for f in found["findings"] if f["check"] == "image-missing")
    assert offender["level"] == "error" and offender["file_name"] == "3.jpg"
    again = run("--coco-json", out, "--image-root", root, "--tokenizer", "shapes")
    assert again.returncode == 0 and "0 errors, 0 warnings" in again.stdout
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".json") == ["images"]


def test_only_five_offenders_and_marked_captions(data, tmp_path):
    content, _, root = data
    for image in content["images"]:
        image["caption"] = "a red circle and two\x1b dogs"
    content["annotations"] = [
        {"id": k, "image_id": 0, "bbox": [1, 1, 5, 5], "tokens_positive": [[2, 99]]}
        for k in range(8)
    ]
    path = write(tmp_path / "captions.json", content)
    done = run("--coco-json", path, "--image-root", root, "--tokenizer", "shapes")
    assert done.returncode == 1 and "(grounding)" in done.stdout
    assert done.stdout.count(r"a [red circle and two\x1b dogs]") == 5
    assert "  and 3 more" in done.stdout


def test_pictures(data, tmp_path):
    _, path, root = data
    folder = tmp_path / "pictures"
    options = ("--image-root", root, "--no-images", "--show", 3, "--output", folder)
    done = run("--coco-json", path, *options)
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["000_0.png", "001_1.png", "002_2.png", "contact_sheet.png"]
    for name in names:
        with Image.open(folder / name) as picture:
            picture.load()


REGISTER = """
from fiber_d2.data import register_coco_json
register_coco_json("my_data", {path!r}, {root!r})
"""


def test_a_registered_name(data, tmp_path):
    _, path, root = data
    (tmp_path / "mine.py").write_text(REGISTER.format(path=str(path), root=str(root)))
    done = run("--import", tmp_path / "mine.py", "--dataset", "my_data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "my_data (detection): 4 images" in done.stdout
    done = run("--dataset", "my_data")
    assert done.returncode == 2
    assert done.stderr.startswith("error: The data set 'my_data' is not registered")


@pytest.mark.slow
def test_builtin_names_in_all_kinds(tmp_path):
    prepare_shapes(tmp_path / "shapes", num_train=4, num_val=2)
    kinds = ("detection", "grounding", "refexp")
    for kind in kinds:
        done = run(
            "--dataset", f"shapes_{kind}_train", "--also-dataset", f"shapes_{kind}_val",
            "--show", 2, "--output", tmp_path / kind, "--tokenizer", "shapes",
            DETECTRON2_DATASETS=str(tmp_path),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"shapes_{kind}_train ({kind}): " in done.stdout
        assert "0 errors, 0 warnings" in done.stdout
        assert len(list((tmp_path / kind).glob("*.png"))) == 3


@pytest.mark.slow
def test_several_splits(data, tmp_path):
    content, path, root = data
    content["images"] = content["images"][2:]
    content["annotations"] = content["annotations"][2:]
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "good.json", content)
    done = run("--coco-json", path, other, "--image-root", root)
    assert done.returncode == 0 and "duplicate-file" in done.stdout
    assert f"{other} image 2 (2.jpg): it is in {path} as well, as image 2" in done.stdout
    done = run("--coco-json", other, "--also-json", path, "--image-root", root)
    assert done.stdout.count("(detection)") == 1 and "duplicate-file (warning)" in done.stdout


MISTAKES = [
    (["--coco-json", "FILE"], "need --image-root"),
    (["--coco-json", "FILE", "--image-root", "nowhere"], "nowhere is not a folder"),
    (["--coco-json", "nothing.json", "--image-root", "ROOT"], "nothing.json does not exist"),
    (["--coco-json", "FILE", "--image-root", "ROOT", "--fix", "FILE"], "would overwrite"),
    (["--coco-json", "FILE", "FILE", "--image-root", "ROOT", "--fix", "x.json"], "one data set"),
    (["--coco-json", "FILE", "--image-root", "ROOT", "--show", "3"], "belong together"),
    (["--coco-json", "FILE", "--image-root", "ROOT", "--tokenizer", "./no"], "no tokenizer at"),
    (["--dataset", "coco_2017_val"], "does not exist"),
    (["--coco-json", "FILE", "--dataset", "x"], "not allowed with"),
    ([], "required"),
    (["--coco-json", "FILE", "--image-root", "ROOT", "--workers", "-1"], "not at least 0"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(arguments, message, data, tmp_path, script):
    _, path, root = data
    places = {"FILE": str(path), "ROOT": str(root)}
    code, error = script([places.get(text, text) for text in arguments], tmp_path)
    assert code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "x.json").exists()


@pytest.fixture
def script(monkeypatch, capfd):
    """The same without a process of its own, which takes seconds to start."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("validate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def script(arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("DETECTRON2_DATASETS", str(cwd))
        try:
            code = module.main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, capfd.readouterr().err

    return script


def test_broken_json_is_an_error_of_the_data(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text('{"images": [{"id": 1, "file_na')
    done = run("--coco-json", path, "--image-root", tmp_path, "--fix", tmp_path / "out.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cut.json is not json" in done.stdout and "no repaired copy" in done.stdout
    assert not (tmp_path / "out.json").exists()


SLOW_IMAGES = """
import time
from fiber_d2.data import register_coco_json
from fiber_d2.data.validation import image_files

register_coco_json("my_data", {path!r}, {root!r})
decode = image_files._decode


def slow(data):
    # Long enough to be interrupted, short enough for a worker that ends its batch first.
    open({started!r}, "w").close()
    time.sleep(0.5)
    return decode(data)


image_files._decode = slow
"""


def test_ctrl_c_shows_what_was_found(data, tmp_path):
    content, path, root = data
    content["annotations"][1]["bbox"] = [30, 6, 0, 12]
    write(path, content)
    started = tmp_path / "started"
    text = SLOW_IMAGES.format(path=str(path), root=str(root), started=str(started))
    (tmp_path / "slow.py").write_text(text)
    options = ("--import", tmp_path / "slow.py", "--dataset", "my_data", "--workers", 2)
    process = subprocess.Popen(
        [*COMMAND, *map(str, options), "--json", str(tmp_path / "report.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "NOT COMPLETE, interrupted" in out and "box-empty" in out
    assert "Traceback" not in error
    assert json.loads((tmp_path / "report.json").read_text())["complete"] is False
