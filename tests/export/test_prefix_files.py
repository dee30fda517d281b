"""Files that other programs read, at other sizes than the one traced."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from fiber_d2.export.onnx_files import save_onnx
from fiber_d2.export.parts import Graphs
from fiber_d2.export.programs import save_program, trace

# Another process, which knows the file alone.
RUN_PROGRAM = """
import sys, numpy as np, torch
module = torch.export.load(sys.argv[1]).module(check_guards=False)
inputs = np.load(sys.argv[2])
with torch.no_grad():
    found = module(*(torch.from_numpy(inputs[name]) for name in inputs.files))
np.savez(sys.argv[3], *(x.numpy() for x in (found if isinstance(found, tuple) else [found])))
assert "fiber_d2" not in sys.modules
"""


@pytest.mark.slow
def test_image_prefix_of_version_3_in_both_formats(tiny, tmp_path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is of the extra `export`, part of `dev`")
    import onnxruntime

    cfg = LazyConfig.load(str(tiny.config))
    cfg.model.backbone.vision.query_norm = True
    graph = Graphs(instantiate(cfg.model)).parts()[1]
    program = trace(graph)
    save_program(program, tmp_path / "prefix.pt2")
    save_onnx(program, graph, tmp_path / "prefix.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "prefix.onnx")
    for number, shape in enumerate([(2, 3, 96, 160), (1, 3, 32, 32)]):
        image = np.random.default_rng(number).random(shape, dtype=np.float32) * 255
        with torch.no_grad():
            expected = graph.module(torch.from_numpy(image))
        found = session.run(graph.outputs, {"image": image})
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            np.testing.assert_allclose(one, other, atol=1e-5)
        np.savez(tmp_path / "in.npz", image)
        command = [sys.executable, "-c", RUN_PROGRAM, "prefix.pt2", "in.npz", "out.npz"]
        subprocess.run(command, check=True, cwd=tmp_path)
        saved = np.load(tmp_path / "out.npz")
        assert len(saved.files) == len(expected)
        for name, other in zip(saved.files, expected):
            np.testing.assert_allclose(saved[name], other, atol=1e-5)
