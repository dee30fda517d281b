"""``fiber-d2 demo`` as it is typed: mistakes at once, and a server over real HTTP."""

import io
import json
import socket
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from fiber_d2 import cli
from fiber_d2.commands import demo
from fiber_d2.predictor import Classes, Predictor

PATIENCE = 120
BOUNDARY = "----somewhere"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """``run(*arguments) -> (exit status, what it complained of)``, in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fiber_d2.commands.demo.prepare_process", lambda: None)

    def run(*arguments):
        code = cli.main(["demo", *map(str, arguments)])
        return code, capsys.readouterr().err

    return run


def test_without_the_quickstart_it_says_what_to_do(run):
    code, err = run()
    assert (code, err.count("\n")) == (2, 1)
    assert "output/quickstart/model_final.pth" in err and "make quickstart" in err
    assert "--weights" in err


def test_mistakes_are_one_line_and_status_2(run, tiny, tmp_path, monkeypatch):
    model = ("--config", tiny.config, "--weights", tiny.weights)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        for arguments, message in (
            (("--port", taken), f"port {taken} (Address already in use)"),
            (("--port", 70000), "between 0 and 65535"),
            (("--port", 0, "--host", "203.0.113.1"), "Cannot listen at 203.0.113.1"),
            (("--port", 0, "--host", "no name"), "Cannot listen at no name"),
            (("--threshold", 40), "between 0 and 1"),
            (("--timeout", 0), "timeout is 0"),
            (("--port", 0, "--examples", "absent"), "not a folder"),
            (("--port", 0, "--config", "quickstop"), "neither a file"),
            (("--port", 0, "--weights", "absent.pth"), "absent.pth does not exist"),
        ):
            code, err = run(*model, *arguments)
            assert (code, err.count("\n")) == (2, 1), err
            assert err.startswith("fiber-d2 demo: error: ") and message in err
    monkeypatch.setitem(sys.modules, "waitress", None)
    code, err = run(*model)
    assert code == 2 and "pip install waitress" in err


@pytest.mark.parametrize(
    "host, told",
    [
        ("127.0.0.1", False),
        ("127.8.0.1", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("192.168.1.5", True),
        ("::", True),
    ],
)
def test_it_says_when_others_can_reach_it(host, told, capsys):
    demo.warn_if_open(host)
    assert ("everyone who reaches this machine" in capsys.readouterr().err) == told


def post(server, data, text="red circle. blue cross", kind="classes", **headers):
    """Status and answer of a question over HTTP."""
    parts = [("text", text.encode()), ("kind", kind.encode()), ('image"; filename="x', data)]
    body = b"".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
        + value
        + b"\r\n"
        for name, value in parts
    )
    body += f"--{BOUNDARY}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", **headers}
    request = urllib.request.Request(f"{server.url}/api/predict", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_answers_are_the_predictor_s(server, tiny):
    predictor = Predictor(tiny.config, tiny.weights, device="cpu")
    names = ["red circle", "blue cross"]
    for path in tiny.images:
        status, answer = post(server, path.read_bytes())
        expected = predictor(path, Classes(names), threshold=demo.LOWEST_SCORE)
        assert status == 200 and expected.words
        # Another process, with another number of threads.
        for one, other in zip(answer["detections"], expected.to_dict()["detections"]):
            assert one["words"] == other["words"]
            assert one["score"] == pytest.approx(other["score"], rel=1e-4)
            assert one["box"] == pytest.approx(other["box"], abs=1e-2)
        assert len(answer["detections"]) == len(expected.words)


@pytest.mark.slow
def test_an_expression_s_box_is_there_whatever_its_score(server, tiny):
    status, answer = post(server, tiny.images[0].read_bytes(), "the red circle", "expression")
    assert status == 200 and answer["detections"]


@pytest.mark.slow
def test_bad_requests_over_http_leave_the_server_serving(server, tiny):
    good = tiny.images[0].read_bytes()
    large = io.BytesIO()
    Image.fromarray(np.zeros((1200, 1200, 3), np.uint8)).save(large, "PNG")
    for data, status in (
        (b"", 400),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        (b"/etc/passwd", 415),
        (good[: len(good) // 2], 422),
        (large.getvalue(), 413),
        (bytes(600_000), 413),
    ):
        answered, answer = post(server, data)
        assert (answered, list(answer)) == (status, ["error"])
    assert post(server, good, Origin="http://evil.example")[0] == 403
    assert post(server, good, Host="evil.example")[0] == 421
    address = server.url.removeprefix("http://")
    for raw in (
        b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
        b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
        b"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00 no HTTP at all\r\n\r\n",
    ):
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            connection.sendall(raw)
            status_line = connection.makefile("rb").readline()
        assert status_line.split()[1] in (b"400", b"404", b"413"), raw
    # Half a question, and gone.
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\nab"
        )
    assert post(server, good)[0] == 200
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_crowd_is_answered_or_told_to_come_again(server, tiny):
    """More at once than there are places: every one gets an answer, and the right one."""
    good = tiny.images[0].read_bytes()
    answers, expected = [], post(server, good)[1]["detections"]
    crowd = [threading.Thread(target=lambda: answers.append(post(server, good))) for _ in range(24)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join(PATIENCE)
    assert len(answers) == 24 and {status for status, _ in answers} <= {200, 503}
    served = [answer for status, answer in answers if status == 200]
    assert served and all(answer["detections"] == expected for answer in served)
    assert all("Busy" in answer["error"] for status, answer in answers if status == 503)
    assert post(server, good)[0] == 200


@pytest.mark.slow
def test_it_does_not_say_what_it_is(server):
    with urllib.request.urlopen(server.url, timeout=PATIENCE) as response:
        assert response.status == 200 and not response.headers["Server"]
