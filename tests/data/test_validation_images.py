"""Image files as they come: missing, damaged, turned, huge, copied, and read by processes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fiber_d2.data.validation import Options, draw_samples, image_files, source_of_json, validate
from fiber_d2.data.validation import run as run_module
from fiber_d2.text import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("shapes")


@pytest.fixture
def found(coco, tokenizer):
    """``found(...)`` -> {image id: checks} of image files."""
    content, path, root = coco

    def found(workers=0, **options):
        Path(path).write_text(json.dumps(content))
        report = validate(
            [source_of_json(path, root)], Options(tokenizer, workers=workers, **options)
        )
        assert report.stopped is None
        by_id = {}
        for finding in report.findings:
            if finding.check.startswith("image-") and finding.level != "info":
                by_id.setdefault(finding.image_id, set()).add(finding.check)
        return by_id

    return found


def save_turned(path, orientation):
    with Image.open(path) as image:
        image = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files(workers, coco, found, monkeypatch):
    monkeypatch.setattr(image_files, "_BATCH", 2)
    content, _, root = coco
    assert found(workers) == {}
    root = Path(root)
    os.remove(root / "0.png")
    whole = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(whole[: len(whole) // 2])
    (root / "2.png").write_text("no image")
    content["images"][3]["width"] += 1
    (root / "4.png").write_bytes(b"")
    os.remove(root / "5.png")
    os.mkfifo(root / "5.png")  # reading it would wait for ever
    assert found(workers) == {
        10: {"image-missing"},
        11: {"image-unreadable"},
        12: {"image-unreadable"},
        13: {"image-size"},
        14: {"image-unreadable"},
        15: {"image-missing"},
    }
    assert found(workers, read_images=False) == {}


def test_turned_images(coco, found):
    content, _, root = coco
    save_turned(f"{root}/0.png", 6)
    save_turned(f"{root}/1.png", 3)
    save_turned(f"{root}/3.png", 8)
    content["images"][3].update(width=30, height=50)  # as Detectron2 reads it
    assert found() == {
        10: {"image-rotated-size", "image-rotated"},
        11: {"image-rotated"},
        13: {"image-rotated"},
    }


def test_huge_images(found, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)  # 40 x 30 is above, twice it is not
    assert found() == {k: {"image-huge"} for k in (10, 11, 12, 13, 14)}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 790)  # 40 x 40 is above twice that
    assert found()[12] == {"image-bomb"}


def test_an_image_of_many_captions_is_read_once(grounding, tokenizer, monkeypatch):
    content, path, root = grounding
    for image in content["images"]:
        image.update(file_name="0.png", width=40, height=30)
    Path(path).write_text(json.dumps(content))
    report = validate([source_of_json(path, root)], Options(tokenizer, workers=0))
    assert len(report.facts) == 1
    assert not report.counts()["image-size"]


def test_a_worker_that_dies_ends_the_reading(coco, tokenizer, monkeypatch):
    monkeypatch.setattr(image_files, "_decode", lambda data: os._exit(9))
    report = validate([source_of_json(*coco[1:])], Options(tokenizer, workers=1))
    assert "died" in report.stopped
    assert report.counts()["box-crowd"] == 1


def test_drawing_passes_over_what_is_broken(coco, grounding, tokenizer, tmp_path):
    content, path, root = coco
    boxes = content["annotations"]
    boxes[0].update(bbox=[1, 2, float("nan"), 3])
    boxes[1].update(category_id=[7], iscrowd=0)
    boxes[2].update(bbox=[-1e300, 2, 2e300, 9])
    boxes[3].update(bbox=[1, 2, 0, 3])
    content["images"][2]["file_name"] = "../2.png"
    os.remove(f"{root}/3.png")
    Path(path).write_text(json.dumps(content))
    sentences, sentences_path, _ = grounding
    sentences["images"][0]["caption"] = 5
    sentences["images"][1]["tokens_positive_eval"] = [3]
    sentences["annotations"][3]["tokens_positive"] = [[-3, 99]]
    Path(sentences_path).write_text(json.dumps(sentences))
    for file in (path, sentences_path):
        source = source_of_json(file, root)
        report = validate([source], Options(tokenizer, workers=0, read_images=False))
        folder = tmp_path / source.kind
        paths = draw_samples(source, report.contents[0], 4, folder)
        assert sorted(paths) == sorted(folder.iterdir()) and len(paths) >= 3


@pytest.fixture
def splits(coco, tmp_path):
    """Two splits in folders of their own that share no image, as (train, val) sources."""
    content, path, root = coco
    shutil.copytree(root, tmp_path / "val")
    for image in content["images"]:
        file = tmp_path / "val" / image["file_name"]
        with Image.open(file) as opened:
            pixels = opened.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels.save(file)
    (tmp_path / "val.json").write_text(json.dumps(content))
    return path, root, str(tmp_path / "val.json"), str(tmp_path / "val")


def duplicates(sources, also=(), **options):
    report = validate(sources, Options(load_tokenizer("shapes"), workers=0, **options), also)
    return [(f.check, f.source, f.image_id) for f in report.findings if "duplicate" in f.check]


def test_duplicates_across_splits(splits):
    path, root, val_path, val_root = splits
    train, val = source_of_json(path, root), source_of_json(val_path, val_root)
    assert duplicates([train, val]) == []
    shutil.copy(f"{root}/3.png", f"{val_root}/4.png")
    assert duplicates([train, val]) == [("duplicate-content", "val.json", 14)]
    assert duplicates([train], also=[val]) == [("duplicate-content", "instances.json", 13)]
    assert duplicates([train, val], read_images=False) == []
    os.remove(f"{val_root}/2.png")
    os.symlink(f"{root}/2.png", f"{val_root}/2.png")
    expected = [("duplicate-file", "val.json", 12)]
    assert duplicates([train, val], read_images=False) == expected
    # Captions of one image within a split are no duplicates.
    train.content["images"][1]["file_name"] = "0.png"
    assert duplicates([train]) == []


def test_an_interruption_keeps_what_was_found(coco, tokenizer, monkeypatch):
    content, path, root = coco
    content["annotations"][0]["bbox"] = [1, 2, 0, 3]
    Path(path).write_text(json.dumps(content))
    os.remove(f"{root}/0.png")
    read = run_module.read_images

    def interrupted(*args, **options):
        read(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "read_images", interrupted)
    report = validate([source_of_json(path, root)], Options(tokenizer, workers=0))
    assert report.stopped == "interrupted"
    counts = report.counts()
    assert counts["box-empty"] == 1 and counts["image-missing"] == 1
