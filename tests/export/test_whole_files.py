"""A detector as an ONNX file, against the predictor that it was made of; sizes, questions and
numbers of captions are others than those traced."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fiber_d2.commands import export as command
from fiber_d2.export import ExportedModel, ExportedPredictor
from fiber_d2.export.quantize import quantize_onnx
from fiber_d2.predictor import Predictor

from .conftest import QUESTIONS, awake, check_same

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("libraries")]


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    return awake(tiny, tmp_path_factory.mktemp("awake") / "model.pth")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """What the command writes."""
    folder = tmp_path_factory.mktemp("whole") / "onnx"
    given = ("--config", str(model.config), "--weights", str(model.weights))
    assert command.main([*given, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def predictor(model):
    return Predictor(model.config, model.weights, device="cpu")


def test_same_detections(folder, predictor, model):
    exported = ExportedPredictor(folder, threads=1)
    images = [np.asarray(Image.open(path)) for path in model.images]
    images += [images[0][:30], images[0][:, :12], np.tile(images[1], (3, 5, 1))]
    for question in QUESTIONS:
        for found, expected in zip(exported(images, question), predictor(images, question)):
            check_same(found, expected)
    limits = {"threshold": 0.01, "max_detections": 3, "nms_thresh": 0.3}
    for one in images:
        asked = one, QUESTIONS[0]
        check_same(exported(*asked, **limits), predictor(*asked, **limits))


def test_what_is_written(folder):
    known = json.loads((folder / "export.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["export.json", "model.onnx"]
    assert (known["format"], known["int8"], known["graphs"]["model"]["outputs"]) == (
        "onnx",
        False,
        ["boxes", "class_scores", "centerness"],
    )


def test_images_and_captions_of_a_batch_do_not_meet(folder):
    model = ExportedModel(folder, threads=1)
    random = np.random.default_rng(0)
    images = random.random((2, 3, 64, 96), dtype=np.float32) * 255
    ids = random.integers(5, 50, (2, 7))
    ids[1, 4:] = model.known["pad_token_id"]
    mask = ids != model.known["pad_token_id"]
    positive = np.eye(3, 7, k=1, dtype=np.float32)[None].repeat(2, axis=0)
    both = model.detect(model.image_prefix(images), ids, mask, positive)
    for row, tokens in ((0, 7), (1, 4)):
        one = slice(row, row + 1)
        alone = model.detect(
            model.image_prefix(images[one]),
            *(ids[one, :tokens], mask[one, :tokens], positive[one, :, :tokens]),
        )
        for found, expected in zip(both, alone):
            np.testing.assert_allclose(found[one], expected, rtol=1e-4, atol=1e-5)


def test_captions_that_do_not_fit(folder):
    model = ExportedModel(folder, threads=1)

    def ask(images, captions, tokens):
        prefix = model.image_prefix(np.zeros((images, 3, 32, 32), dtype=np.float32))
        ids = np.full((captions, tokens), 5)
        positive = np.ones((captions, 1, tokens), dtype=np.float32)
        return model.detect(prefix, ids, np.ones_like(ids, dtype=bool), positive)

    longest = model.known["max_tokens"]
    assert ask(1, 2, longest)[0].shape[0] == 2
    with pytest.raises(ValueError, match=f"has {longest + 1} tokens, but the text tower holds"):
        ask(1, 1, longest + 1)
    with pytest.raises(ValueError, match="3 captions for 2 images"):
        ask(2, 3, 4)


def test_eight_bits(folder, tmp_path):
    """Fewer bytes, and numbers that are near."""
    small = tmp_path / "int8"
    shutil.copytree(folder, small)
    quantize_onnx(small / "model.onnx")
    sizes = [(one / "model.onnx").stat().st_size for one in (folder, small)]
    assert sizes[1] < 0.8 * sizes[0]
    random = np.random.default_rng(0)
    image = random.random((1, 3, 64, 96), dtype=np.float32) * 255
    text = random.integers(5, 50, (1, 7)), np.ones((1, 7), dtype=bool)
    positive = np.eye(3, 7, k=1, dtype=np.float32)[None]
    exact, near = (
        one.detect(one.image_prefix(image), *text, positive)
        for one in (ExportedModel(one, threads=1) for one in (folder, small))
    )
    for found, expected in zip(near[1:], exact[1:]):
        assert 0 < np.abs(found - expected).mean() < 0.05


def test_a_file_that_is_gone(folder, tmp_path):
    shutil.copy(folder / "export.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="model.onnx is missing: export the model again"):
        ExportedModel(tmp_path)
