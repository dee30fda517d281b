"""What files may hold: containers of values, never code."""

import argparse
import collections
import os
import pathlib

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from yacs.config import CfgNode

from fiber_d2.checkpoint.files import read_file, state_dict_of


@pytest.mark.parametrize("legacy", [False, True])
def test_what_real_files_hold(tmp_path, legacy):
    content = {
        "model": {"w": torch.ones(2)},
        "args": argparse.Namespace(lr=1e-4, out=pathlib.PosixPath("out"), names=["a"]),
        "cfg": CfgNode({"A": {"B": [1, 2]}}),
        "detectron_cfg": get_cfg(),
        "best": np.float64(0.5),
        "step": np.int64(7),
        "flag": np.bool_(True),
        "history": np.arange(3.0),
        "milestones": collections.Counter({3: 1}),
        "meters": collections.defaultdict(list, {"loss": [1.0]}),
        "window": collections.deque([1, 2], maxlen=2),
        "seen": {1, 2},
        "raw": b"\x00\xff",
    }
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    before = set(torch.serialization.get_safe_globals())
    loaded = read_file(path)
    assert loaded["args"].out == pathlib.PosixPath("out")
    assert loaded["cfg"] == {"A": {"B": [1, 2]}}
    assert loaded["detectron_cfg"]["MODEL"]["DEVICE"] == content["detectron_cfg"].MODEL.DEVICE
    assert loaded["best"] == 0.5 and loaded["step"] == 7 and loaded["flag"]
    assert loaded["history"].tolist() == [0.0, 1.0, 2.0]
    assert loaded["meters"] == {"loss": [1.0]} and loaded["window"] == [1, 2]
    assert loaded["seen"] == {1, 2} and loaded["raw"] == b"\x00\xff"
    # The list of what is allowed does not outlive the reading.
    assert set(torch.serialization.get_safe_globals()) == before


def test_numpy_scalars_under_the_name_of_numpy_1(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"best": np.float32(0.25)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != data or b"numpy.core.multiarray" in data
    path.write_bytes(old)
    assert read_file(path)["best"] == 0.25


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_code_is_refused_and_not_run(tmp_path):
    evil = Malicious()
    evil.target = str(tmp_path / "ran")
    torch.save({"model": {"w": torch.ones(1)}, "x": evil}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="mkdir.*refused.*save only its weights"):
        read_file(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 half a zip"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pth cannot be read"):
        read_file(tmp_path / "x.pth")
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read"):
        read_file(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"y\.pth does not exist"):
        read_file(tmp_path / "y.pth")


def test_state_dicts_hold_tensors_only():
    weights = {"w": torch.ones(1)}
    assert state_dict_of({"state_dict": weights}, "x") == weights
    assert state_dict_of(weights, "x") == weights
    with pytest.raises(ValueError, match="beside tensors it holds epoch"):
        state_dict_of({"model": {**weights, "epoch": 3}}, "x")
    for empty in ({}, [], {"model": {}}, 3):
        with pytest.raises(ValueError, match="no model weights"):
            state_dict_of(empty, "x")
