"""The three parts of a detector in both formats, against the predictor that it was made of."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fiber_d2.export import ExportedPredictor, export
from fiber_d2.predictor import Predictor

from .conftest import QUESTIONS, awake, check_same

pytestmark = pytest.mark.slow

# Another process, which knows the files alone.
RUN_PROGRAMS = """
import json, sys, torch, torchvision
known = json.load(open("export.json"))
state = {
    "image": torch.full((1, 3, 32, 96), 100.0),
    "input_ids": torch.full((1, 3), 5),
    "attention_mask": torch.ones(1, 3, dtype=torch.bool),
    "positive_map": torch.eye(3)[None],
}
for graph in known["graphs"].values():
    module = torch.export.load(graph["file"]).module(check_guards=False)
    with torch.no_grad():
        found = module(*(state[name] for name in graph["inputs"]))
    state.update(zip(graph["outputs"], [found] if torch.is_tensor(found) else found))
assert "fiber_d2" not in sys.modules
print(json.dumps([list(state[name].shape) for name in ("boxes", "class_scores", "centerness")]))
"""


def check_questions(folder, model):
    exported = ExportedPredictor(folder, threads=1)
    predictor = Predictor(model.config, model.weights, device="cpu", overrides=model.overrides)
    images = [np.asarray(Image.open(path)) for path in model.images]
    images += [images[0][:30], images[0][:, :12]]
    for question in QUESTIONS:
        for found, expected in zip(exported(images, question), predictor(images, question)):
            check_same(found, expected)


def test_programs_of_version_3(tiny, tmp_path):
    model = awake(tiny, tmp_path / "v3.pth", "model.backbone.vision.query_norm=True")
    folder = export(
        model.config,
        model.weights,
        tmp_path / "out",
        format="torch",
        parts=True,
        overrides=model.overrides,
    )
    names = ["export.json", "fused.pt2", "image_prefix.pt2", "text_prefix.pt2"]
    assert sorted(path.name for path in folder.iterdir()) == names
    check_questions(folder, model)
    done = subprocess.run(
        [sys.executable, "-c", RUN_PROGRAMS], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Of 4 x 12, 2 x 6, 1 x 3, 1 x 2 and 1 x 1 places.
    assert json.loads(done.stdout) == [[1, 66, 4], [1, 66, 3], [1, 66]]


def test_onnx_without_deform_conv(tiny, tmp_path, libraries):
    import onnx

    model = awake(tiny, tmp_path / "model.pth")
    folder = export(
        model.config, model.weights, tmp_path / "out", parts=True, deform_conv="grid_sample"
    )
    kinds = {node.op_type for node in onnx.load(folder / "fused.onnx").graph.node}
    assert "GridSample" in kinds and "DeformConv" not in kinds
    check_questions(folder, model)
