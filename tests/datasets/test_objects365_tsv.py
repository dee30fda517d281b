"""COCO json -> TSV -> COCO json: exact, restartable, and clear about what is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from fiber_d2.data.readers import load_detection_json
from fiber_d2.data.tsv import TSVFile, load_tsv_dataset, read_tsv_image, write_tsv

SCRIPT = Path(__file__).resolve().parents[2] / "datasets" / "objects365_tsv.py"
# Sums of such numbers are not exact in floating point.
SIDES = [3, 20.0, 0.1, 7.3, 1e-7, 12.345678901234567, 1e22]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("objects365_tsv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def program(script, capsys):
    """Runs the script with arguments; gives what it prints, or its one line of complaint."""

    def run(*arguments, code=0):
        capsys.readouterr()
        try:
            found = script.main(list(map(str, arguments)))
        except SystemExit as stop:  # of the parser
            found = stop.code
        printed = capsys.readouterr()
        assert found == code, printed.err
        if code:
            assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
        return printed.err if code else printed.out

    return run


@pytest.fixture
def source(tmp_path):
    """A json with its images, in a folder; sparse ids in no order, one image without boxes."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    (folder / "patch1").mkdir(parents=True)
    categories = [
        {"id": 40, "name": "dog"},
        {"id": 3, "name": "hot dog (é)"},
        {"id": 7, "name": "z"},
    ]
    images, annotations = [], []
    for index in range(9):
        name = f"patch1/{index} {'é' if index == 4 else ''}.{'png' if index % 2 else 'jpg'}"
        width, height = generator.integers(20, 40, 2).tolist()
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        image_id = 900 - 7 * index
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for number in range(index):
            bbox = [SIDES[k % len(SIDES)] for k in (index, number, 3 * number + 1, index + number)]
            annotations.append(
                {
                    "id": 10 * index + number,
                    "image_id": image_id,
                    "category_id": 7 if index == 8 and not number else [40, 3][number % 2],
                    "bbox": bbox,
                    "iscrowd": int(number == 2),
                }
            )
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def to_tsv(program):
    def run(source, *more, code=0, json_name="instances.json"):
        paths = ["--json", source / json_name, "--image-root", source / "images"]
        return program("to-tsv", *paths, "--output", source / "tsv", *more, code=code)

    return run


@pytest.fixture
def to_json(program):
    def run(source, *more, code=0, yaml="train.yaml"):
        paths = ["--yaml", source / "tsv" / yaml, "--json", source / "back.json"]
        return program("to-json", *paths, *more, code=code)

    return run


def boxes(content):
    return Counter(
        (a["image_id"], a["category_id"], tuple(a["bbox"]), a["iscrowd"])
        for a in content["annotations"]
    )


def snapshot(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_round_trip(to_tsv, to_json, source):
    to_tsv(source, "--workers", 2)
    assert "9 images, 36 boxes, 3 classes" in to_json(source, "--image-root", source / "again")
    before = json.loads((source / "instances.json").read_text())
    after = json.loads((source / "back.json").read_text())
    assert boxes(after) == boxes(before)
    assert after["categories"] == before["categories"]
    assert after["images"] == sorted(before["images"], key=lambda image: image["id"])
    assert [a["id"] for a in after["annotations"]] == list(range(1, 37))
    for image in before["images"]:
        name = image["file_name"]
        assert (source / "again" / name).read_bytes() == (source / "images" / name).read_bytes()


@pytest.mark.slow
def test_as_a_program(source):
    paths = ["--json", source / "instances.json", "--output", source / "tsv"]
    command = [sys.executable, "-W", "ignore", SCRIPT, "to-tsv", *paths, "--image-root"]
    done = subprocess.run([*command, source / "images"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(load_tsv_dataset(str(source / "tsv" / "train.yaml"))) == 9
    done = subprocess.run(
        [*command, source / "nothing", "--name", "other"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: The image") and done.stderr.count("\n") == 1


def test_records_are_those_of_the_json(to_tsv, source):
    to_tsv(source)
    found = load_tsv_dataset(str(source / "tsv" / "train.yaml"))
    expected = load_detection_json(str(source / "instances.json"), str(source / "images"))
    assert found.class_names == ["dog", "hot dog (é)", "z"]
    for one, other in zip(found, expected):
        assert all(one[key] == other[key] for key in ("image_id", "height", "width"))
        image = np.asarray(Image.open(other["file_name"]).convert("RGB"))
        np.testing.assert_array_equal(read_tsv_image(one, "RGB"), image)
        # The TSV reader clips, and leaves out what is not larger than a pixel.
        kept = []
        for entry in other["annotations"]:
            x, y, w, h = entry["bbox"]
            box = np.array([x, y, min(x + w, other["width"]), min(y + h, other["height"])])
            if (box[2:] - box[:2] > 1 + 1e-9).all():
                kept.append((entry["category_id"], entry["iscrowd"], box))
        assert len(one["annotations"]) == len(kept)
        for entry, (category, crowd, box) in zip(one["annotations"], kept):
            assert (entry["category_id"], entry["iscrowd"]) == (category, crowd)
            assert entry["bbox_mode"] == BoxMode.XYXY_ABS
            np.testing.assert_allclose(entry["bbox"], box, atol=1e-9)


def test_class_aware_list(to_tsv, to_json, source):
    to_tsv(source, "--cas", 12, "--seed", 1)
    records = load_tsv_dataset(str(source / "tsv" / "train.cas12.yaml"))
    whole = load_tsv_dataset(str(source / "tsv" / "train.yaml"))
    seen = Counter()
    for index in range(len(records)):
        seen.update(set(records.objects(index)[1].tolist()))
    assert set(seen) == {0, 1, 2} and min(seen.values()) >= 12
    assert len(whole) == 9 and len({records.row(index) for index in range(len(records))}) < 9
    # Back from the list: each row that is in it once.
    to_json(source, yaml="train.cas12.yaml")
    images = json.loads((source / "back.json").read_text())["images"]
    assert len(images) == len({records.row(index) for index in range(len(records))})


def test_what_is_finished_is_kept(to_tsv, to_json, source):
    to_tsv(source)
    folder = source / "tsv"
    complete = snapshot(folder)
    assert not [name for name in complete if name.endswith((".partial", ".tmp"))]
    (source / "images").rename(source / "moved")  # images are not read again
    assert to_tsv(source).count("left alone") == 3
    assert snapshot(folder) == complete
    (source / "moved").rename(source / "images")
    (folder / "train.label.lineidx").unlink()  # stopped before it was complete
    (folder / "train.yaml").unlink()
    assert to_tsv(source).count("left alone") == 2
    assert snapshot(folder) == complete
    to_tsv(source, "--overwrite")
    assert snapshot(folder) == complete

    to_json(source)
    written = (source / "back.json").stat().st_mtime_ns
    assert "left alone" in to_json(source)
    assert (source / "back.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("cut", [0, 1, 700, -1])
def test_interrupted_images_go_on(to_tsv, source, cut):
    """As a killed run leaves them: some rows, of which the index lists some."""
    to_tsv(source)
    folder = source / "tsv"
    complete = snapshot(folder)
    data, index = complete["train.img.tsv"], complete["train.img.lineidx"].splitlines(True)
    for name in ("train.img.tsv", "train.img.lineidx", "train.yaml"):
        (folder / name).unlink()
    begins_fifth = int(index[5])
    (folder / "train.img.tsv.partial").write_bytes(data[: begins_fifth + cut])
    (folder / "train.img.lineidx.partial").write_bytes(b"".join(index[:5]) + index[5][:1])
    images = json.loads((source / "instances.json").read_text())["images"]
    first = min(images, key=lambda image: image["id"])
    # Rows that are complete are not made again: the first image need not even be there.
    os.remove(source / "images" / first["file_name"])
    to_tsv(source)
    assert snapshot(folder) == complete


def test_stopped_between_index_and_file(to_tsv, source):
    to_tsv(source)
    complete = snapshot(source / "tsv")
    (source / "tsv" / "train.img.tsv").rename(source / "tsv" / "train.img.tsv.partial")
    to_tsv(source)
    assert snapshot(source / "tsv") == complete


def edit(source, change, name="changed.json"):
    content = json.loads((source / "instances.json").read_text())
    change(content)
    (source / name).write_text(json.dumps(content))
    return name


def test_other_annotations_are_not_mixed_in(to_tsv, source):
    to_tsv(source)
    complete = snapshot(source / "tsv")
    name = edit(source, lambda content: content["annotations"].pop())
    assert "made of other annotations" in to_tsv(source, json_name=name, code=2)
    assert snapshot(source / "tsv") == complete
    to_tsv(source, "--overwrite", json_name=name)
    assert snapshot(source / "tsv") != complete
    (source / "tsv" / "train.cas3.yaml").write_text("old")
    to_tsv(source, "--overwrite")
    assert snapshot(source / "tsv") == complete
    to_tsv(source, "--name", "other", json_name=name)


def test_missing_images(to_tsv, source):
    os.remove(source / "images" / "patch1" / "1 .png")
    message = to_tsv(source, code=2)
    assert "1 .png does not exist" in message and "--skip-missing" in message
    assert not (source / "tsv" / "train.img.tsv").exists()
    assert "1 images without a file are left out" in to_tsv(source, "--skip-missing", "--overwrite")
    assert len(load_tsv_dataset(str(source / "tsv" / "train.yaml"))) == 8


def set_size(content):
    content["images"][2]["width"] += 1


def leave_root(content):
    content["images"][2]["file_name"] = "../outside.jpg"


def same_names(content):
    content["categories"][0]["name"] = "z"


def tab_in_name(content):
    content["images"][2]["file_name"] = "patch1/2\t.jpg"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_size, "pixels, but the json says"),
        (leave_root, "leads out"),
        (same_names, "two classes one name"),
        (tab_in_name, "a tab"),
    ],
)
def test_json_at_fault(to_tsv, source, change, words):
    (source / "images" / "patch1" / "2\t.jpg").write_bytes(
        (source / "images" / "patch1" / "2 .jpg").read_bytes()
    )
    assert words in to_tsv(source, json_name=edit(source, change), code=2)
    assert not (source / "tsv" / "train.img.tsv").exists()


def test_damaged_image(to_tsv, source):
    (source / "images" / "patch1" / "3 .png").write_bytes(b"no image")
    assert "3 .png cannot be read" in to_tsv(source, code=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["to-tsv"], "required"),
        (["to-json", "--yaml", "none.yaml", "--json", "out.json"], "none.yaml does not exist"),
        (["to-json", "--yaml", "a", "--json", "b", "--workers", "0"], "--workers"),
        (["nothing"], "invalid choice"),
    ],
)
def test_wrong_arguments(program, arguments, words):
    assert words in program(*arguments, code=2)


@pytest.fixture
def foreign(to_tsv, source):
    """A TSV made elsewhere: two columns, and a middle column that is no file name."""
    to_tsv(source)
    folder = source / "foreign"
    folder.mkdir()
    images = list(TSVFile(str(source / "tsv" / "train.img.tsv")))[:3]
    keys = ["img/a", "12", "img_c"]
    rows = [[keys[0], images[0][2]], [keys[1], "1", images[1][2]], [keys[2], images[2][2]]]
    write_tsv(rows, str(folder / "images.tsv"))
    write_tsv([[key, "[]"] for key in keys], str(folder / "label.tsv"))
    (folder / "map.json").write_text('{"cat": 2, "dog": 1}')
    (folder / "set.yaml").write_text("img: images.tsv\nlabel: label.tsv\nlabelmap: map.json\n")
    return folder


def test_foreign_files(program, foreign, tmp_path):
    paths = ["--yaml", foreign / "set.yaml", "--json", tmp_path / "out.json"]
    program("to-json", *paths, "--image-root", tmp_path / "out")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert [(i["id"], i["file_name"]) for i in content["images"]] == [
        (13, "img_a.jpg"),
        (12, "12.png"),
        (14, "img_c.jpg"),
    ]
    for image in content["images"]:
        with Image.open(tmp_path / "out" / image["file_name"]) as found:
            assert found.size == (image["width"], image["height"])


def test_file_names_stay_in_the_folder(program, foreign, tmp_path):
    rows = list(TSVFile(str(foreign / "images.tsv")))
    rows[1][1] = "../escaped.png"
    write_tsv(rows, str(foreign / "images.tsv"))
    paths = ["--yaml", foreign / "set.yaml", "--json", tmp_path / "out.json"]
    message = program("to-json", *paths, "--image-root", tmp_path / "out", code=2)
    assert "Row 1 of" in message and "leads out of the folder" in message
    assert not (tmp_path / "escaped.png").exists() and not (tmp_path / "out.json").exists()


def test_keys_must_differ(program, foreign, tmp_path):
    for name in ("images.tsv", "label.tsv"):
        rows = list(TSVFile(str(foreign / name)))
        write_tsv([["12", *row[1:]] for row in rows], str(foreign / name))
    paths = ["--yaml", foreign / "set.yaml", "--json", tmp_path / "out.json"]
    assert "have the key 12" in program("to-json", *paths, code=2)
