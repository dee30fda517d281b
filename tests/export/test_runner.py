"""Exported models are asked as the predictor is; here the files' place is taken by the modules."""

import json

import numpy as np
import pytest
from detectron2.config import LazyConfig
from PIL import Image

from fiber_d2.export import ExportedModel, ExportedPredictor
from fiber_d2.export.description import FILE, describe
from fiber_d2.export.parts import Graphs
from fiber_d2.predictor import Classes, Predictor
from fiber_d2.predictor_settings import settings_of

QUESTION = Classes(["red circle", "blue cross", "green triangle"])


@pytest.fixture
def predictor(tiny):
    return Predictor(tiny.config, tiny.weights, device="cpu")


@pytest.fixture(params=["whole", "parts"])
def folder(request, tiny, predictor, tmp_path, monkeypatch):
    known = describe(predictor.model, settings_of(LazyConfig.load(str(tiny.config))))
    graphs = getattr(Graphs(predictor.model), request.param)()
    modules = {graph.name: graph.module for graph in graphs}
    known.update(format="torch", graphs={})
    for graph in graphs:
        (tmp_path / graph.name).touch()
        known["graphs"][graph.name] = {
            "file": graph.name,
            "inputs": list(graph.arguments),
            "outputs": list(graph.outputs),
        }
    (tmp_path / FILE).write_text(json.dumps(known))
    monkeypatch.setattr("fiber_d2.export.runner.load_program", lambda path: modules[path.name])
    return tmp_path


@pytest.mark.parametrize("limits", [{}, {"threshold": 0.01, "max_detections": 3}])
def test_same_answers_as_the_predictor(folder, predictor, tiny, limits):
    exported = ExportedPredictor(folder)
    images = [np.asarray(Image.open(path)) for path in tiny.images]
    images.append(images[0][:, :25])
    for question in (QUESTION, "a red circle left of the blue cross"):
        both = exported(images, question, **limits), predictor(images, question, **limits)
        for found, expected in zip(*both):
            assert len(found.instances) == len(expected.instances) > 0
            np.testing.assert_allclose(
                found.instances.pred_boxes.tensor, expected.instances.pred_boxes.tensor, atol=1e-3
            )
            np.testing.assert_allclose(found.instances.scores, expected.instances.scores, atol=1e-5)
            assert found.words == expected.words


def test_what_it_cannot_do(folder, tiny):
    image = np.zeros((1, 3, 50, 32), dtype=np.float32)
    with pytest.raises(ValueError, match="50x32 pixels: both sides must be multiples of 32"):
        ExportedModel(folder).image_prefix(image)
    with pytest.raises(ValueError, match="give no heat maps"):
        ExportedPredictor(folder).token_heatmaps(tiny.images[0], QUESTION)
