"""Making the generated data set: parameters, repeatability, interruption, simultaneous calls."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from omegaconf import OmegaConf

from fiber_d2.data import shapes
from fiber_d2.data.shapes import MARKER, generate_shapes, main, prepare_shapes
from fiber_d2.data.shapes_params import ShapesParams
from fiber_d2.data.shapes_scene import make_scene
from fiber_d2.data.shapes_write import picture

TINY = {"num_train": 6, "num_val": 3}


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate_shapes(tmp_path / name, seed=seed, **TINY)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    same = {name for name in a if a[name] == c[name]}
    assert same == {"flickr30k_entities/train.txt", "flickr30k_entities/val.txt"}


def test_a_larger_set_begins_with_the_images_of_a_smaller_one(tmp_path):
    generate_shapes(tmp_path / "small", num_train=3, num_val=1)
    generate_shapes(tmp_path / "large", num_train=5, num_val=2)
    small, large = contents(tmp_path / "small"), contents(tmp_path / "large")
    per_image = [n for n in small if n.startswith("images") or n.endswith((".xml", "00.txt"))]
    assert len(per_image) >= 8
    assert all(small[name] == large[name] for name in per_image)


def test_splits_differ():
    params = ShapesParams()
    pictures = [picture(make_scene(params, s, 0), params, s, 0) for s in ("train", "val")]
    assert not np.array_equal(*pictures)


def test_prepare_leaves_a_finished_set_alone_and_replaces_another(tmp_path, monkeypatch):
    root = tmp_path / "shapes"
    assert prepare_shapes(root, **TINY) == str(root)
    before = contents(root)
    monkeypatch.setattr(shapes, "_generate", None)  # a call would fail
    prepare_shapes(root, **TINY)
    assert contents(root) == before
    monkeypatch.undo()
    prepare_shapes(root, seed=1, **TINY)
    assert contents(root) != before
    assert json.loads((root / MARKER).read_text())["parameters"]["seed"] == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"shapes", ".shapes.lock"}


def test_prepare_replaces_a_set_of_an_older_format(tmp_path, monkeypatch):
    root = tmp_path / "shapes"
    monkeypatch.setattr(shapes, "FORMAT_VERSION", 0)
    prepare_shapes(root, **TINY)
    monkeypatch.undo()
    prepare_shapes(root, **TINY)
    assert json.loads((root / MARKER).read_text())["format_version"] == shapes.FORMAT_VERSION


def test_parameters_from_a_lazy_config_are_the_same_set(tmp_path):
    root = tmp_path / "shapes"
    prepare_shapes(root, colors=("red", "blue"), **TINY)
    marker = (root / MARKER).stat().st_mtime_ns
    prepare_shapes(root, colors=OmegaConf.create(["red", "blue"]), **TINY)
    assert (root / MARKER).stat().st_mtime_ns == marker


def test_an_interrupted_run_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    root = tmp_path / "shapes"
    prepare_shapes(root, **TINY)
    before = contents(root)
    add = shapes.SplitWriter.add

    def stop_at_the_third(self, index):
        if index == 2:
            raise KeyboardInterrupt
        add(self, index)

    monkeypatch.setattr(shapes.SplitWriter, "add", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes(root, seed=9, **TINY)
    assert contents(root) == before
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes(tmp_path / "new", seed=9, **TINY)
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    prepare_shapes(tmp_path / "new", seed=9, **TINY)
    generate_shapes(tmp_path / "straight", seed=9, **TINY)
    assert contents(tmp_path / "new") == contents(tmp_path / "straight")


@pytest.mark.slow
def test_a_killed_process_does_no_harm(tmp_path):
    root = tmp_path / "shapes"
    arguments = ["--root", str(root), "--num-train", "3000", "--num-val", "3"]
    command = [sys.executable, "-m", "fiber_d2.data.shapes", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 120
        while len(list((tmp_path / ".shapes.partial").rglob("*.jpg"))) < 5:
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not root.exists()
    prepare_shapes(root, **TINY)
    generate_shapes(tmp_path / "straight", **TINY)
    assert contents(root) == contents(tmp_path / "straight")
    assert not (tmp_path / ".shapes.partial").exists()


def test_simultaneous_calls_generate_once(tmp_path, monkeypatch):
    root, calls = tmp_path / "shapes", []
    generate = shapes._generate

    def counted(place, params):
        calls.append(place)
        return generate(place, params)

    monkeypatch.setattr(shapes, "_generate", counted)
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(prepare_shapes, root, **TINY) for _ in range(4)]
        assert [future.result() for future in done] == [str(root)] * 4
    assert len(calls) == 1


def test_prepare_does_not_touch_a_folder_of_something_else(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    (root / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a generated data set"):
        prepare_shapes(root, **TINY)
    assert contents(root) == {"mine.txt": b"precious"}


def test_damaged_marker_is_named(tmp_path):
    (tmp_path / MARKER).write_text("{")
    with pytest.raises(ValueError, match=r"shapes\.json is damaged"):
        prepare_shapes(tmp_path, **TINY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"colors": ("red", "mauve")},
        {"shapes": ()},
        {"shapes": ("circle", "circle")},
        {"min_objects": 5, "max_objects": 4},
        {"image_size": 16},
        {"small": (0.1, 0.3)},
        {"twin_share": 1.5},
        {"seed": -1},
        {"lvis_rare_max": 100},
        {"image_format": "gif"},
        {"num_images": 4},
    ],
)
def test_a_parameter_that_cannot_be_used_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ShapesParams.from_mapping(wrong)


def test_no_room_is_an_error():
    crowded = ShapesParams(min_objects=9, max_objects=9, small=(0.5, 0.52), large=(0.55, 0.6))
    with pytest.raises(ValueError, match="no room"):
        make_scene(crowded, "train", 0)


def test_command_line(tmp_path, capsys):
    root = tmp_path / "shapes"
    arguments = ["--root", str(root), "--seed", "2", "--num-train", "4", "--num-val", "2"]
    arguments += ["--image-size", "96", "--colors", "red", "cyan", "--small", "0.15", "0.2"]
    main([*arguments, "--hard-relations", "--train-relation-share", "0.5"])
    out = capsys.readouterr().out
    assert "train: 4 images" in out and "val: 2 images" in out
    parameters = json.loads((root / MARKER).read_text())["parameters"]
    assert parameters["colors"] == ["red", "cyan"] and parameters["small"] == [0.15, 0.2]
    assert parameters["hard_relations"] is True and parameters["train_relation_share"] == 0.5
    with pytest.raises(SystemExit):
        main(["--root", str(root), "--colors", "mauve"])
    assert "colors must be" in capsys.readouterr().err
