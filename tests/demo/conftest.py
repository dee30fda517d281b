"""A server of the demo as it is typed, and a browser to look at it."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Generous: for machines that are busy with something else. A test that fails waits so long.
PATIENCE = 120


class Server:
    """``fiber-d2 demo`` in a process of its own; ``url`` says where."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.log = folder / "demo.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fiber_d2", "demo", "--port", "0", *map(str, arguments)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self.url = self._wait_for_url()

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            match = re.search(r"http://\S+", self.log.read_text())
            if match:
                return match.group()
            time.sleep(0.1)
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"the demo did not start:\n{self.log.read_text()}")

    def stop(self) -> None:
        """By Ctrl-C, as people do; that it is an orderly end is part of the test."""
        self.process.send_signal(signal.SIGINT)
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        assert status == 0 and "Traceback" not in self.log.read_text(), self.log.read_text()


class Browser:
    """Tells ``browser.py`` what to do."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("browser.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        hello = self._hear()
        self.missing = hello.get("missing")

    def _hear(self) -> dict:
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            raise AssertionError(f"the browser is silent:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def tell(self, **command):
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        return self._hear()["value"]

    def run(self, script: str):
        """The value of an expression, by way of JSON."""
        said = self.tell(run=f"JSON.stringify({script})")
        return None if said in (None, "") else json.loads(said)

    def until(self, script: str):
        """Wait for an expression to be true."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}\npage: {self.run('document.body.innerText')}")

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def server(tiny, tmp_path_factory):
    """A demo of the tiny model, with limits that are easily met."""
    server = Server(
        tmp_path_factory.mktemp("server"),
        *("--config", tiny.config, "--weights", tiny.weights, "--device", "cpu"),
        *("--max-upload", "0.5", "--max-pixels", "1", "--threshold", "0.1"),
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser") / "browser.log")
    if browser.missing:
        browser.stop()
        pytest.skip(f"no browser: {browser.missing} (pip install PyQt6-WebEngine)")
    yield browser
    browser.stop()
