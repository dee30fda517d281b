"""``fiber-d2`` as it is typed: exit statuses, messages, files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fiber_d2 import cli
from fiber_d2.predictor import Expression, Predictor

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run in this process, in ``tmp_path``: ``run(*arguments) -> (exit status, out, err)``."""
    monkeypatch.chdir(tmp_path)
    # It is for a process of its own, and would change that of the tests.
    monkeypatch.setattr("fiber_d2.commands.validate.prepare_process", lambda: None)

    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def predict(run, tiny):
    model = ("--config", tiny.config, "--weights", tiny.weights, "--device", "cpu")
    return lambda *arguments: run("predict", *arguments, *model)


def test_images_become_pictures_and_numbers(predict, tiny, tmp_path):
    (tmp_path / "names.txt").write_text("red circle\n\nblue cross\n")
    folder = tiny.images[0].parent
    code, out, _ = predict(folder, "--classes-file", "names.txt", "--threshold", 0.01, "--coco",
                           "--output", "out", "--max-detections", 3)  # fmt: skip
    assert code == 0
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert list(found) == [str(path) for path in tiny.images]
    assert f"{sum(len(f['detections']) for f in found.values())} boxes in 2 images" in out
    for path, one in found.items():
        assert one["targets"] == ["red circle", "blue cross"]
        assert 0 < len(one["detections"]) <= 3
        assert [one["width"], one["height"]] == list(Image.open(path).size)
        with Image.open(tmp_path / "out" / "pictures" / Path(path).name) as picture:
            assert min(picture.size) > 100
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert len(coco["annotations"]) == sum(len(f["detections"]) for f in found.values())


def test_heat_maps_are_drawn_beside_the_boxes(predict, tiny, tmp_path):
    names = [f"class {number}" for number in range(12)]
    for number, question in enumerate((["--classes", *names], ["--caption", "a circle, a cross"])):
        folder = tmp_path / str(number)
        code, _, _ = predict(tiny.images[0], *question, "--heatmaps", "--picture-size", 0,
                             "--threshold", 0.01, "--output", folder)  # fmt: skip
        assert code == 0
        stem = tiny.images[0].stem
        written = {path.name for path in (folder / "pictures").iterdir()}
        assert written == {f"{stem}.png", f"{stem}_heatmap.png"}
        with Image.open(folder / "pictures" / f"{stem}_heatmap.png") as picture:
            # Three panels of 448 pixels in a row and three rows; or a row of two.
            width, height = picture.size
            assert (width // 400, height // 400) == ((3, 3), (2, 1))[number]


def test_an_expression_has_one_box_whatever_its_score(predict, tiny, tmp_path):
    code, _, _ = predict(tiny.images[0], "--expression", "the red circle", "--threshold", 0.99,
                         "--no-pictures")  # fmt: skip
    assert code == 0
    (found,) = json.loads((tmp_path / "output/predict/predictions.json").read_text()).values()
    assert [d["words"] for d in found["detections"]] == ["the red circle"]
    assert not (tmp_path / "output/predict/pictures").exists()


def test_the_summary_counts_and_says_what_to_try(predict, tiny):
    image, folder = tiny.images[0], tiny.images[0].parent
    _, out, _ = predict(image, "--expression", "the red circle", "--no-pictures")
    assert out.startswith("1 box in 1 image: ")
    _, out, _ = predict(folder, "--classes", "circle", "--threshold", 0.999, "--no-pictures")
    assert out.startswith("0 boxes in 2 images (no score reaches 0.999; --threshold lowers that): ")


def test_precision_is_the_predictor_s(predict, tiny, tmp_path):
    scores = {}
    for precision in ("float32", "bfloat16"):
        code, _, _ = predict(tiny.images[0], "--expression", "the red circle", "--no-pictures",
                             "--precision", precision)  # fmt: skip
        assert code == 0
        (found,) = json.loads((tmp_path / "output/predict/predictions.json").read_text()).values()
        predictor = Predictor(tiny.config, tiny.weights, device="cpu", precision=precision)
        best = predictor(tiny.images[0], Expression("the red circle")).best()
        scores[precision] = found["detections"][0]["score"]
        assert scores[precision] == pytest.approx(float(best["instances"].scores[0]))
    assert scores["float32"] != scores["bfloat16"]


def test_json_goes_to_standard_output(predict, tiny, tmp_path):
    code, out, _ = predict(tiny.images[0], "--classes", "circle", "--json", "--no-pictures",
                           "--threshold", 0.01)  # fmt: skip
    saved = json.loads((tmp_path / "output/predict/predictions.json").read_text())
    assert code == 0 and json.loads(out) == saved and saved[str(tiny.images[0])]["detections"]


def test_ctrl_c_keeps_what_was_found(predict, tiny, tmp_path, monkeypatch):
    from fiber_d2.commands import predict as command

    ask, asked = command.Answers.ask, []

    def interrupted(self, images):
        if asked:
            raise KeyboardInterrupt
        asked.append(images)
        return ask(self, images)

    monkeypatch.setattr(command.Answers, "ask", interrupted)
    code, _, err = predict(*tiny.images, "--classes", "circle", "--batch-size", 1)
    assert code == 130 and "what was found so far is kept" in err
    saved = json.loads((tmp_path / "output/predict/predictions.json").read_text())
    assert list(saved) == [str(tiny.images[0])]


def test_a_bad_image_is_left_out(predict, tiny, tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    code, out, err = predict("*.jpg", tiny.images[0], "--caption", "a circle and a cross",
                             "--no-pictures")  # fmt: skip
    assert code == 1 and "in 1 image" in out and "images" not in out
    assert err.count("left out:") == 1 and "a.jpg" in err and "Traceback" not in err


@pytest.fixture
def video(tmp_path):
    """Five frames, ten a second."""
    path = tmp_path / "v.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    assert writer.isOpened()
    for shade in range(5):
        writer.write(np.full((48, 64, 3), 40 * shade, np.uint8))
    writer.release()
    return path


def test_video(predict, tmp_path, video):
    code, _, _ = predict("v.avi", "--classes", "circle", "--every", 2, "--threshold", 0.01)
    assert code == 0
    found = json.loads((tmp_path / "output/predict/predictions.json").read_text())
    assert list(found) == ["v.avi#0", "v.avi#2", "v.avi#4"]
    written = cv2.VideoCapture(str(tmp_path / "output/predict/pictures/v.mp4"))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and written.get(cv2.CAP_PROP_FPS) == 5


def test_webcam(predict, tmp_path, video, monkeypatch):
    """As OpenCV opens one: by a number. A file stands in for the device."""
    opened, capture = [], cv2.VideoCapture

    def open_device(number):
        opened.append(number)
        return capture(str(video) if number == 1 else "")

    monkeypatch.setattr(cv2, "VideoCapture", open_device)
    code, out, _ = predict("webcam:1", "--classes", "circle", "--frames", 2, "--every", 2)
    assert code == 0 and "in 2 images" in out and opened == [1]
    found = json.loads((tmp_path / "output/predict/predictions.json").read_text())
    assert list(found) == ["webcam:1#0", "webcam:1#2"]
    assert (tmp_path / "output/predict/pictures/webcam_1.mp4").is_file()
    code, _, err = predict("webcam", "--classes", "circle")
    assert code == 1 and opened[1:] == [0] and "webcam cannot be opened" in err


def test_mistakes_are_one_line_and_status_2(run, predict, tiny, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "folder").mkdir()
    image = tiny.images[0]
    for arguments, message in (
        ((tmp_path / "absent.jpg", "--classes", "a"), "absent.jpg is no image"),
        (("folder", "--classes", "a"), "folder is no image"),
        ((image, "--classes-file", "absent.txt"), "absent.txt does not exist"),
        ((image, "--classes-file", "empty.txt"), "holds no name"),
        ((image, "--caption", "a cat", "--template", "a {}"), "--template goes with"),
        ((image, "--classes", "a", "--every", 0), "--every is 0, but is at least 1"),
        ((image, "--classes", "a", "--frames", -1), "at least 1"),
        ((image, "--classes", "a", "--threshold", 40), "between 0 and 1"),
        ((image, "--classes", "a", "--picture-size", 9), "0 or at least 64"),
        ((image, "--classes", "a", "--heatmaps", "--no-pictures"), "leave --no-pictures out"),
        ((image, "--caption", " "), "text with words"),
        ((image, "--classes", "a", "--output", "empty.txt/out"), "Not a directory"),
    ):
        code, _, err = predict(*arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith("fiber-d2 predict: error: ") and message in err
    code, _, err = run("predict", image, "--classes", "a")
    assert code == 2 and "train the quickstart first" in err
    code, _, err = run("predict", image, "--classes", "a", "--config", "quickstop")
    assert code == 2 and "neither a file" in err
    assert run("predict", image)[0] == run("pedict")[0] == run()[0] == 2


def test_info(run):
    code, out, _ = run("info")
    assert code == 0 and "modulated_deform_conv2d" in out
    code, out, _ = run("info", "--json")
    info = json.loads(out)
    import torch

    import fiber_d2

    assert info["fiber_d2"] == fiber_d2.__version__
    assert torch.__version__.startswith(info["libraries"]["torch"])
    assert "quickstart" in info["configs"]


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(run, command):
    assert command in run("--help")[1]
    code, out, _ = run(command, "--help")
    assert code == 0 and out.startswith(f"usage: fiber-d2 {command}")
    assert "train_net.py" not in out and f"  fiber-d2 {command} " in out


def test_training_and_evaluation_are_the_engine(run, monkeypatch):
    from fiber_d2.engine import main as engine

    given = []
    monkeypatch.setattr(engine, "main", lambda argv, prog, _: given.append((argv, prog)))
    quickstart = str(REPOSITORY / "configs" / "quickstart.py")
    assert run("train", "quickstart", "--resume", "a=1")[0] == 0
    assert run("eval", "--config-file", "x.py", "a=1")[0] == 0
    assert given == [
        (["--config-file", quickstart, "--resume", "a=1"], "fiber-d2 train"),
        (["--eval-only", "--config-file", "x.py", "a=1"], "fiber-d2 eval"),
    ]
    code, _, err = run("train", "quickstop")
    assert code == 2 and "neither a file" in err


def test_validate_and_convert_say_what_is_wrong(run, tmp_path):
    code, _, err = run("validate", "--coco-json", "x.json")
    assert code == 2 and "--image-root" in err
    code, _, err = run("convert", "from-fiber", "absent.pth", "out.pth")
    assert code == 2 and err.startswith("fiber-d2 convert: error: ") and err.count("\n") == 1
    assert "absent.pth" in err and not (tmp_path / "out.pth").exists()


def test_messages_of_the_engine_name_the_command(run):
    code, _, err = run("eval", "quickstart", "train.devise=cpu", "train.output_dir=out")
    assert code == 2 and err.startswith("fiber-d2 eval: error: ") and "train.device" in err


@pytest.mark.slow
def test_as_a_module_from_elsewhere(tmp_path):
    def start(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "fiber_d2", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    done = start("info", "--json")
    assert done.stderr == ""
    assert done.returncode == 0 and "quickstart" in json.loads(done.stdout)["configs"]
    done = start("eval", "quickstart", "train.devise=cpu")
    assert done.returncode == 2 and "train.device" in done.stderr
    assert "Traceback" not in done.stderr
