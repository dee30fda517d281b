import errno
import json
import logging
import os

import pytest
import torch
from torch import nn

from fiber_d2.engine.checkpointer import FiberCheckpointer
from fiber_d2.engine.durable import (
    DamagedFileError,
    check_checkpoint,
    find_disk_full,
    save_verified,
    write_atomically,
    write_json,
)
from fiber_d2.engine.errors import PlainRunError

DATA = {"model": {"w": torch.arange(50_000, dtype=torch.float32)}, "iteration": 3}


@pytest.fixture
def sound(tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save(DATA, path)
    return path


def test_json_for_programs_and_people(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(str(path), {"AP": 1.5, "best": None})
    assert json.loads(path.read_text()) == {"AP": 1.5, "best": None}
    assert path.read_text().splitlines()[1] == '  "AP": 1.5,'
    assert path.read_text().endswith("}\n")


def test_a_sound_file(sound):
    check_checkpoint(sound)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_file_that_is_cut_off(sound, share):
    content = open(sound, "rb").read()
    open(sound, "wb").write(content[: int(share * len(content))])
    with pytest.raises(DamagedFileError, match=r"model\.pth"):
        check_checkpoint(sound)


def test_one_bit_of_the_weights_which_torch_does_not_notice(sound):
    content = bytearray(open(sound, "rb").read())
    content[len(content) // 2] ^= 1
    open(sound, "wb").write(content)
    assert not torch.equal(torch.load(sound)["model"]["w"], DATA["model"]["w"])
    with pytest.raises(DamagedFileError, match=r"checksum of \S+ differs"):
        check_checkpoint(sound)


class BadDisk:
    """Changes a byte of what is written, so many times."""

    def __init__(self, monkeypatch, times):
        self.left = times
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, handle):
        self.fsync(handle)
        if self.left and os.fstat(handle).st_size > 1000:
            self.left -= 1
            os.pwrite(handle, b"!", os.fstat(handle).st_size // 2)


def test_what_the_disk_changes_once_is_written_again(tmp_path, monkeypatch, caplog):
    BadDisk(monkeypatch, times=1)
    path = str(tmp_path / "model.pth")
    with caplog.at_level(logging.WARNING):
        save_verified(DATA, path)
    assert "is written once more" in caplog.text
    check_checkpoint(path)


def test_what_the_disk_changes_always_replaces_nothing(tmp_path, monkeypatch):
    path = str(tmp_path / "model.pth")
    save_verified(DATA, path)
    BadDisk(monkeypatch, times=-1)
    with pytest.raises(PlainRunError, match="the disk is failing"):
        save_verified({**DATA, "iteration": 4}, path)
    assert torch.load(path)["iteration"] == 3
    assert os.listdir(tmp_path) == ["model.pth"]


class FullDisk:
    """A file that takes some bytes and then raises as the system does."""

    def __init__(self, file, limit):
        self.file, self.left = file, limit

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


@pytest.mark.parametrize("limit", [0, 500, 100_000])
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, limit):
    path = str(tmp_path / "model.pth")
    save_verified(DATA, path)
    with pytest.raises(PlainRunError, match=r"model\.pth cannot be written: No space left"):
        # torch reports something of its own, from inside of which the cause has to be found.
        write_atomically(path, lambda file: torch.save({"new": DATA}, FullDisk(file, limit)))
    assert torch.load(path)["iteration"] == 3
    # What was written so far does not take room.
    assert os.listdir(tmp_path) == ["model.pth"]


def test_causes_that_are_no_full_disk():
    assert find_disk_full(None) is None
    assert find_disk_full(OSError(errno.EIO, "broken")) is None
    first, second = ValueError(), RuntimeError()
    first.__cause__, second.__cause__ = second, first
    assert find_disk_full(first) is None


@pytest.fixture
def run(tmp_path):
    """A folder with checkpoints of iterations 1, 3 and 5, the weight says which."""
    model = nn.Linear(1, 1)
    checkpointer = FiberCheckpointer(model, str(tmp_path))
    for iteration in (1, 3, 5):
        nn.init.constant_(model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def damage(run, *names):
    for name in names:
        path = os.path.join(run.save_dir, name)
        content = open(path, "rb").read()
        open(path, "wb").write(content[:-200])


def test_the_last_sound_checkpoint(run, caplog):
    assert run.resume_or_load("")["iteration"] == 5
    damage(run, "model_0000005.pth")
    with caplog.at_level(logging.WARNING):
        assert run.resume_or_load("")["iteration"] == 3
    assert "model_0000005.pth: File is not a zip file" in caplog.text
    assert "going on from the one before, model_0000003.pth" in caplog.text
    assert run.model.weight.item() == 3
    os.remove(os.path.join(run.save_dir, "model_0000005.pth"))
    damage(run, "model_0000003.pth")
    assert run.resume_or_load("")["iteration"] == 1
    damage(run, "model_0000001.pth")
    with pytest.raises(ValueError, match="model_0000005.pth does not exist; model_0000003.pth: "):
        run.resume_or_load("")


def test_what_comes_after_the_last_one_belongs_to_another_run(run):
    FiberCheckpointer(run.model, run.save_dir).save("model_0000002", iteration=2)
    damage(run, "model_0000002.pth")
    assert run.resume_or_load("")["iteration"] == 1


def test_the_final_checkpoint_comes_after_all_others(run):
    run.save("model_final", iteration=6)
    assert run.resume_or_load("")["iteration"] == 6
    damage(run, "model_final.pth")
    assert run.resume_or_load("")["iteration"] == 5
