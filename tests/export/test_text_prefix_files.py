"""The cheapest part in both formats, at other sizes than the one traced."""

import sys

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from fiber_d2.export import load_program, onnx_files
from fiber_d2.export.parts import Graphs
from fiber_d2.export.programs import save_program, trace
from fiber_d2.export.quantize import quantize_onnx

SIZES = [(2, 5), (1, 1), (4, 20)]


@pytest.fixture(scope="module")
def graph(tiny):
    cfg = LazyConfig.load(str(tiny.config))
    cfg.model.backbone.text.num_layers = 3  # the first of them sees text alone
    return Graphs(instantiate(cfg.model)).parts()[0]


@pytest.fixture(scope="module")
def program(graph):
    return trace(graph)


def captions(batch, tokens):
    random = np.random.default_rng(batch)
    mask = np.ones((batch, tokens), dtype=bool)
    mask[0, max(1, tokens // 2) :] = False
    ids = np.where(mask, random.integers(5, 50, (batch, tokens)), 1)
    return {"input_ids": ids, "attention_mask": mask}


def expected(graph, inputs):
    with torch.no_grad():
        return graph.module(*map(torch.from_numpy, inputs.values())).numpy()


def test_program(graph, program, tmp_path):
    save_program(program, tmp_path / "text.pt2")
    loaded = load_program(tmp_path / "text.pt2")
    for size in SIZES:
        inputs = captions(*size)
        with torch.no_grad():
            found = loaded(*map(torch.from_numpy, inputs.values())).numpy()
        np.testing.assert_allclose(found, expected(graph, inputs), atol=1e-5)
    with pytest.raises(FileNotFoundError, match="none.pt2 does not exist"):
        load_program(tmp_path / "none.pt2")


def check_onnx(path, graph, tolerance):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [x.shape for x in session.get_inputs()] == [["batch", "tokens"]] * 2
    for size in SIZES:
        inputs = captions(*size)
        (found,) = session.run(["text"], inputs)
        np.testing.assert_allclose(found, expected(graph, inputs), atol=tolerance)


@pytest.mark.parametrize("large", [False, True])
def test_onnx(graph, program, tmp_path, libraries, monkeypatch, large):
    """Weights beyond a limit go into a second file; in 8 bits they need none."""
    if large:
        monkeypatch.setattr(onnx_files, "_ONE_FILE", 0)
    path = tmp_path / "text.onnx"
    onnx_files.save_onnx(program, graph, path)
    second = tmp_path / "text.onnx.data"
    assert second.exists() == large
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    check_onnx(path, graph, 1e-5)
    quantize_onnx(path)
    check_onnx(path, graph, 0.2)
    assert not second.exists() and path.stat().st_size < size


def test_without_the_libraries(graph, program, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="needs the library onnxscript"):
        onnx_files.save_onnx(program, graph, tmp_path / "text.onnx")
