"""The application without a network: pages, answers, refusals."""

import io
import json
import re
import threading

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from werkzeug.test import Client

from fiber_d2.colors import WordColors
from fiber_d2.demo.app import PAGE, DemoApp
from fiber_d2.demo.examples import folder_examples, generated_examples
from fiber_d2.demo.limits import Limits
from fiber_d2.predictions import Prediction

HOST = "127.0.0.1:7860"
LIMITS = Limits(upload_bytes=20_000, pixels=10_000, characters=50, waiting=0, timeout=60)


def png(size=(40, 30)):
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), 99, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Model:
    """Finds each target at a place of its own, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, image, query):
        self.asked.append((image, query))
        count = len(query.words)
        instances = Instances((image.height, image.width))
        instances.pred_boxes = Boxes(torch.arange(4.0 * count).reshape(count, 4))
        instances.scores = torch.linspace(0.9, 0.5, count)
        instances.pred_classes = torch.arange(count)
        return Prediction(instances, query.words)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def app(model):
    app = DemoApp(model, model="a test", limits=LIMITS, hosts=["Demo.example"])
    yield app
    app.close()


@pytest.fixture
def client(app):
    return Client(app)


@pytest.fixture
def predict(client):
    """``predict(data, text, kind, **headers) -> (status, answer, response)``."""

    def predict(data=None, text="red circle. blue cross", kind="classes", **headers):
        form = {"text": text, "kind": kind, "image": (io.BytesIO(data or png()), "x")}
        form = {name: value for name, value in form.items() if value is not None}
        headers = {"Host": HOST, **{k.replace("_", "-"): v for k, v in headers.items()}}
        response = client.post("/api/predict", data=form, headers=headers)
        return response.status_code, json.loads(response.data), response

    return predict


def test_answer(predict, model):
    status, answer, _ = predict()
    assert status == 200
    ((image, query),) = model.asked
    assert image.mode == "RGB" and image.size == (40, 30)
    assert (answer["width"], answer["height"]) == (40, 30)
    assert answer["targets"] == query.words == ["red circle", "blue cross"]
    assert answer["pieces"] == [
        {"text": "red circle", "target": 0},
        {"text": ". ", "target": None},
        {"text": "blue cross", "target": 1},
    ]
    assert [(d["box"], d["target"]) for d in answer["detections"]] == [
        ([0, 1, 2, 3], 0),
        ([4, 5, 6, 7], 1),
    ]
    colors = WordColors([query.words]).of(query.words)
    assert answer["colors"] == ["#" + bytes(colors[words]).hex() for words in query.words]
    assert set(answer["seconds"]) == {"waited", "decoded", "predicted"}
    assert all(value >= 0 for value in answer["seconds"].values())


def test_page_needs_nothing_from_elsewhere(client):
    for name, (file, kind) in PAGE.items():
        response = client.get(f"/{name}", headers={"Host": HOST})
        assert response.status_code == 200 and response.content_type == kind, file
        assert not re.search(r"https?:|//\w|@import|url\(", response.text), file
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in response.headers
    html = client.get("/", headers={"Host": HOST}).text
    # What the policy would not let run.
    assert not re.search(r"<script(?! src)|<style|\sstyle=|\son\w+=", html)
    assert "innerHTML" not in client.get("/demo.js", headers={"Host": HOST}).text


@pytest.mark.parametrize(
    "path",
    [
        "/../app.py",
        "/..%2fapp.py",
        "/%2e%2e/%2e%2e/setup.py",
        "/static/demo.js",
        "/index.html",
        "/etc/passwd",
        "//etc/passwd",
        "/api/examples/../about/x",
        "/api/examples/0",
        "/api/examples/-1",
        "/api/examples/9999",
        "/api/examples/x",
        "/api/predict/",
        "/\x00",
    ],
)
def test_no_other_path_leads_anywhere(client, path):
    response = client.get(path, headers={"Host": HOST})
    assert response.status_code in (404, 308)
    assert set(json.loads(response.data)) == {"error"}
    assert "root:" not in response.text


def test_a_text_is_never_a_path(predict, model, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png())
    status, answer, _ = predict(data=str(path).encode())
    assert status == 415 and not model.asked
    assert predict(text=str(path)[-50:], kind="expression")[0] == 200
    ((image, _),) = model.asked
    assert isinstance(image, Image.Image)


def test_methods(client):
    response = client.get("/api/predict", headers={"Host": HOST})
    assert response.status_code == 405 and "POST" in response.headers["Allow"]
    assert client.post("/", headers={"Host": HOST}).status_code == 405


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:7860", "[::1]:80", "192.168.7.7:1", "localhost:3", "LOCALHOST",
             "demo.example", "demo.example:443"]
)  # fmt: skip
def test_names_it_answers_to(client, host):
    assert client.get("/api/about", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil",
             "[::1", "127.0.0.1@evil.example", "xdemo.example"]
)  # fmt: skip
def test_a_stranger_s_name_for_this_machine_is_refused(client, predict, model, host):
    response = client.get("/", headers={"Host": host})
    assert response.status_code == 421 and "--allow-host" in json.loads(response.data)["error"]
    assert predict(Host=host)[0] == 421 and not model.asked


def test_pages_from_elsewhere_are_refused(predict, model):
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8888"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ):
        status, answer, response = predict(**headers)
        assert status == 403 and "elsewhere" in answer["error"], headers
        assert not [name for name, _ in response.headers if name.startswith("Access-Control")]
    assert not model.asked
    for headers in (
        {"Origin": f"http://{HOST}", "Sec_Fetch_Site": "same-origin"},
        {"Origin": "https://demo.example", "Host": "demo.example"},
        {"Sec_Fetch_Site": "none"},
    ):
        assert predict(**headers)[0] == 200, headers


def test_limits(predict, client, model):
    status, answer, _ = predict(data=bytes(LIMITS.upload_bytes + 1))
    assert status == 413 and "larger than 0.0190735 MB" in answer["error"]
    status, answer, _ = predict(data=bytes(LIMITS.upload_bytes + 100_000))
    assert status == 413 and "larger than" in answer["error"]
    status, answer, _ = predict(png((101, 100)))
    assert status == 413 and "0.01 megapixels" in answer["error"]
    status, answer, _ = predict(text="x" * 51)
    assert status == 413 and "51 characters, and 50" in answer["error"]
    assert predict(text="x" * 100_000)[0] == 413
    form = {"text": "a", "image": (io.BytesIO(png()), "x"), **{f"a{n}": "b" for n in range(20)}}
    assert client.post("/api/predict", data=form, headers={"Host": HOST}).status_code == 413
    assert not model.asked
    assert predict()[0] == 200


def test_what_cannot_be_understood_is_told(predict, client, model, monkeypatch):
    assert predict(text=None)[0] == 400
    response = client.post("/api/predict", data=b"x", headers={"Host": HOST})
    assert response.status_code == 400 and "multipart/form-data" in response.json["error"]
    for text, kind in ((" . ", "classes"), ("a", "poem"), ("", "caption")):
        status, answer, _ = predict(text=text, kind=kind)
        assert status == 422 and answer["error"]
    status, answer, _ = predict(png()[:-30])
    assert status == 422 and "damaged" in answer["error"]
    assert not model.asked

    def too_long(image, query):
        raise ValueError("The text has 300 tokens.")

    monkeypatch.setattr(client.application, "ask", too_long)
    assert predict()[:2] == (422, {"error": "The text has 300 tokens."})


def test_a_failure_inside_is_not_told_to_strangers(predict, client, caplog, monkeypatch):
    def broken(image, query):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(client.application, "ask", broken)
    status, answer, _ = predict()
    assert status == 500 and "secret" not in str(answer)
    assert "/secret/path" in caplog.text
    monkeypatch.undo()
    assert predict()[0] == 200


def test_busy_and_slow(client, predict, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(image, query):
        begun.set()
        assert go.wait(60)

    monkeypatch.setattr(client.application, "ask", slow)
    monkeypatch.setattr(client.application.turns, "timeout", 0.05)
    status, answer, _ = predict()
    assert status == 504 and "longer than 0.05 seconds" in answer["error"]
    assert begun.is_set()
    status, answer, response = predict()
    assert status == 503 and answer["error"].startswith("Busy") and response.headers["Retry-After"]
    assert client.get("/", headers={"Host": HOST}).status_code == 200
    go.set()


def test_generated_examples_are_asked_for_as_typed(model):
    examples = generated_examples()
    client = Client(DemoApp(model, model="a test", examples=examples))
    about = client.get("/api/about", headers={"Host": HOST}).json
    for number, (one, shown) in enumerate(zip(examples, about["examples"])):
        response = client.get(f"/api/examples/{number}", headers={"Host": HOST})
        assert response.data == one.png and response.content_type == "image/png"
        for kind in about["kinds"]:
            form = {"text": shown["texts"][kind], "kind": kind,
                    "image": (io.BytesIO(response.data), "x")}  # fmt: skip
            answer = client.post("/api/predict", data=form, headers={"Host": HOST})
            assert answer.status_code == 200 and answer.json["targets"]
    assert len(model.asked) == 9


def test_examples_of_a_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.txt").write_text("a text")
    (tmp_path / "c.png").write_bytes(png((400, 300)))
    (tmp_path / "d.png").mkdir()
    (one,) = folder_examples(tmp_path, max_pixels=10_000)
    assert one.name == "a" and Image.open(io.BytesIO(one.png)).size == (40, 30)
    with pytest.raises(FileNotFoundError, match="no picture"):
        folder_examples(tmp_path / "d.png", max_pixels=10_000)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        folder_examples(tmp_path / "a.png", max_pixels=10_000)


def test_limits_are_positive():
    with pytest.raises(ValueError, match="timeout is 0"):
        Limits(timeout=0)
    with pytest.raises(ValueError, match="waiting is -1"):
        Limits(waiting=-1)
    assert Limits(waiting=0).waiting == 0
