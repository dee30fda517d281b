import errno
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from fiber_d2.checkpoint import export_fiber_state_dict

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "common" / "models" / "fiber_tiny.py"
SIZES = (32, 64, 128, 256, 512)


@pytest.fixture
def convert(capsys):
    """Run the tool: ``convert(*arguments) -> (exit status, stdout, stderr)``."""
    path = REPOSITORY / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def convert(*arguments):
        code = module.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return convert


@pytest.fixture(scope="module")
def original():
    model = instantiate(LazyConfig.load(str(CONFIG)).model)
    weights = export_fiber_state_dict(model.state_dict(), anchor_sizes=SIZES)
    weights["rpn.head.cls_logits.weight"].normal_()
    return weights


def test_there_and_back(tmp_path, original, convert):
    source = tmp_path / "original.pth"
    averaged = {f"module.{k}": v + 1 if v.is_floating_point() else v for k, v in original.items()}
    torch.save({"model": original, "model_ema": averaged, "iteration": 9}, source)
    ours, back = tmp_path / "ours.pth", tmp_path / "back.pth"
    code, out, _ = convert("from-fiber", source, ours)
    assert code == 0 and "entries" in out
    code, _, error = convert("to-fiber", ours, back, "--like", source, "--anchor-sizes", *SIZES)
    assert code == 0, error
    again = torch.load(back, weights_only=True)["model"]
    assert again.keys() == original.keys()
    assert all(torch.equal(again[name], original[name]) for name in original)

    assert convert("from-fiber", source, tmp_path / "ema.pth", "--ema")[0] == 0
    ema = torch.load(tmp_path / "ema.pth", weights_only=True)["model"]
    plain = torch.load(ours, weights_only=True)["model"]
    assert torch.equal(ema["head.log_scale"], plain["head.log_scale"] + 1)


def test_mistakes_leave_no_file_and_one_message(tmp_path, original, convert):
    torch.save({"model": original}, tmp_path / "original.pth")
    torch.save({"model": {"head.other": torch.ones(1)}}, tmp_path / "other.pth")
    for arguments, message in (
        (("from-fiber", tmp_path / "none.pth"), "none.pth does not exist"),
        (("from-fiber", tmp_path / "other.pth"), "none of the original's fine-grained stage"),
        (("to-fiber", tmp_path / "original.pth"), "has the original's names already"),
        (("to-fiber", tmp_path / "other.pth"), "head.other"),
    ):
        code, _, error = convert(*arguments, tmp_path / "out.pth")
        assert code == 2
        assert message in error and "Traceback" not in error
        assert not (tmp_path / "out.pth").exists()


def test_a_full_disk_is_one_message(tmp_path, original, convert, monkeypatch):
    torch.save({"model": original}, tmp_path / "original.pth")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    code, _, error = convert("from-fiber", tmp_path / "original.pth", tmp_path / "out.pth")
    assert code == 2
    assert error.startswith("convert_checkpoint: error: ") and error.count("\n") == 1
    assert "out.pth cannot be written: No space left" in error
    assert [path.name for path in tmp_path.iterdir()] == ["original.pth"]


def test_start_of_training(tmp_path, original, convert):
    torch.save({"model": original}, tmp_path / "original.pth")
    out = tmp_path / "start.pth"
    code, printed, error = convert(
        "initialize", out, "--config-file", CONFIG, "--fiber", tmp_path / "original.pth"
    )
    assert code == 0, error
    assert "0 of the model keep" in printed
    weights = torch.load(out, weights_only=True)["model"]
    expected = original["rpn.head.bbox_pred.weight"]
    assert torch.equal(weights["head.bbox_pred.weight"], expected)
    code, _, error = convert("initialize", tmp_path / "x.pth", "--config-file", CONFIG)
    assert code == 2 and "--swin, --roberta or --fiber" in error
