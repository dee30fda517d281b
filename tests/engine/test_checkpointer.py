import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from fiber_d2.engine.checkpointer import FiberCheckpointer
from fiber_d2.engine.durable import write_atomically
from fiber_d2.engine.randomness import preserved_random_state, random_state, set_random_state


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "file")
    write_atomically(path, lambda file: file.write(b"old"))

    def broken(file):
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, broken)
    assert open(path, "rb").read() == b"old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert open(path, "rb").read() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_round_trip_with_random_state(tmp_path):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    checkpointer = FiberCheckpointer(model, str(tmp_path), optimizer=optimizer)
    np.random.randn()  # leaves a second number in NumPy's cache, which belongs to the state
    checkpointer.save("model_0000004", iteration=4, random_states=[random_state()])
    expected = draw()

    other = nn.Linear(2, 3)
    other_optimizer = torch.optim.AdamW(other.parameters())
    loader = FiberCheckpointer(other, str(tmp_path), optimizer=other_optimizer)
    rest = loader.resume_or_load("", resume=True)
    assert torch.equal(other.weight, model.weight)
    assert rest["iteration"] == 4
    moments = other_optimizer.state[other.weight]["exp_avg"]
    assert torch.equal(moments, optimizer.state[model.weight]["exp_avg"])
    set_random_state(rest["random_states"][0])
    assert draw() == expected


def test_preserved_random_state_survives_an_error():
    state = random_state()
    expected = draw()
    set_random_state(state)
    with pytest.raises(RuntimeError), preserved_random_state():
        draw()
        raise RuntimeError
    assert draw() == expected


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    FiberCheckpointer(nn.Linear(2, 3), str(tmp_path)).save("model")
    other = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ValueError) as caught:
        FiberCheckpointer(other).load(str(tmp_path / "model.pth"))
    message = str(caught.value)
    assert "2 missing: 0.weight, 0.bias" in message
    assert "2 unexpected: weight, bias" in message
    with pytest.raises(
        ValueError, match=r"1 of another shape: weight \(3, 2\) instead of \(3, 4\)"
    ):
        FiberCheckpointer(nn.Linear(4, 3)).load(str(tmp_path / "model.pth"))


def test_long_lists_of_names_are_cut(tmp_path):
    FiberCheckpointer(nn.Linear(2, 3), str(tmp_path)).save("model")
    many = nn.Sequential(*[nn.Linear(1, 1) for _ in range(10)])
    with pytest.raises(ValueError, match=r"20 missing: .*2\.weight and 15 more"):
        FiberCheckpointer(many).load(str(tmp_path / "model.pth"))


def test_missing_file_names_what_is_there(tmp_path):
    FiberCheckpointer(nn.Linear(2, 3), str(tmp_path)).save("model_0000001")
    with pytest.raises(FileNotFoundError, match=r"model_x\.pth does not.*model_0000001\.pth"):
        FiberCheckpointer(nn.Linear(2, 3)).load(str(tmp_path / "model_x.pth"))


def test_truncated_file(tmp_path):
    FiberCheckpointer(nn.Linear(200, 300), str(tmp_path)).save("model")
    path = tmp_path / "model.pth"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.pth cannot be read"):
        FiberCheckpointer(nn.Linear(200, 300)).load(str(path))


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder_was_here",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Intruder()}, "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read"):
        FiberCheckpointer(nn.Linear(1, 1)).load("bad.pth")
    assert not os.path.exists("intruder_was_here")


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"model": {"a": 1}}])
def test_files_without_weights(tmp_path, content):
    path = str(tmp_path / "model.pth")
    torch.save(content, path)
    with pytest.raises(ValueError, match="holds no model weights|is no state dict"):
        FiberCheckpointer(nn.Linear(1, 1)).load(path)


@pytest.fixture
def small_fiber():
    from detectron2.config import LazyConfig, instantiate

    path = os.path.join(os.path.dirname(__file__), "../../configs/common/models/fiber_tiny.py")
    node = LazyConfig.load(path).model
    return lambda query_norm=False: (
        node.backbone.vision.update(query_norm=query_norm) or instantiate(node)
    )


def test_the_originals_files_are_converted_on_loading(tmp_path, small_fiber):
    from fiber_d2.checkpoint import export_fiber_state_dict

    source, model = small_fiber(), small_fiber()
    weights = export_fiber_state_dict(source.state_dict())
    data = {
        "model": {f"module.{k}": v for k, v in weights.items()},
        "optimizer": {},
        "iteration": 7,
    }
    torch.save(data, tmp_path / "original.pth")
    (tmp_path / "last_checkpoint").write_text("original.pth")
    for name in ("original.pth", "last_checkpoint"):
        with torch.no_grad():
            model.head.bbox_pred.weight.zero_()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        checkpointer = FiberCheckpointer(model, str(tmp_path), optimizer=optimizer)
        rest = checkpointer.load(str(tmp_path / name))
        assert "iteration" not in rest
        expected = source.state_dict()
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[n]) for n, value in model.state_dict().items())
    with pytest.raises(ValueError, match="fusion v2 .*query_norm=False"):
        FiberCheckpointer(small_fiber(True), "").load(str(tmp_path / "original.pth"))
