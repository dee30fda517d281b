#!/usr/bin/env python3
"""Prepare the Python environment for `make`: torch, the libraries, this project, Detectron2.

    python3 tools/setup_env.py .venv      # make that virtual environment, with the tested versions
    python3 tools/setup_env.py current    # add what is missing to the environment of this python
    python3 tools/setup_env.py .venv --tests    # the same, and what tests and documentation need

A virtual environment gets the versions of constraints.txt. With `current`, where torch is installed
already, nothing installed is changed: what is missing is added, in versions that fit the rest.
Running it again costs a fraction of a second, until one of the files it depends on changes.
Only the standard library is needed. pip's own settings (index, proxy, wheel folder) apply.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATE = Path("build", "setup")  # relative: pip splits PIP_CONSTRAINT at spaces
DEPENDS_ON = (
    *("constraints.txt", "setup.py", "pyproject.toml"),
    *("tools/setup_env.py", "tools/install_detectron2.py"),
    *("csrc/cpu_versions.h", "csrc/product.h"),
    *("csrc/deform_conv.cpp", "csrc/focal_loss.cpp", "csrc/module.cpp"),
)
PINS_NEED = (3, 11)
HEARTBEAT_SECONDS = 20

# Prints "name==version" of everything installed; odd versions could not be pinned anyway.
LIST_INSTALLED = """
import importlib.metadata as m, re
for name, version in {(d.metadata["Name"], d.version) for d in m.distributions()}:
    if name and version and re.fullmatch(r"[0-9][0-9A-Za-z.!+]*", version):
        print(f"{name}=={version}")
"""

# Found, not imported: importing torch takes seconds.
LOOK = """
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
"""
NEEDED = "torch torchvision transformers timm pycocotools detectron2 fiber_d2".split()
TESTS_NEED = "pytest ruff hypothesis scipy lvis".split()

# Of the project as it is installed, so that it is not built a second time for them.
LIST_DEV = """
import importlib.metadata
from packaging.requirements import Requirement
for text in importlib.metadata.requires("fiber_d2"):
    requirement = Requirement(text)
    if requirement.marker and requirement.marker.evaluate({"extra": "dev"}):
        print(f"{requirement.name}{requirement.specifier}")
"""

REPORT = """
import platform, warnings
warnings.simplefilter("ignore")
import detectron2, torch, torchvision, transformers, fiber_d2
from torchvision.ops import nms
nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision "
      f"{torchvision.__version__}, transformers {transformers.__version__}, "
      f"Detectron2 {detectron2.__version__}, {gpu}")
"""


class SetupError(RuntimeError):
    """A reason to stop that is told in one line."""


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


class Heartbeat:
    """While a step is silent, say every now and then that it is still going."""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()

    def show(self, line: str) -> None:
        self.last = time.monotonic()
        print(f"    {line}", flush=True)

    def beat(self) -> None:
        while not self.stop.wait(1):
            if time.monotonic() - self.last > HEARTBEAT_SECONDS:
                self.show(f"... {time.monotonic() - self.started:.0f} s")


def worth_showing(line: str) -> bool:
    """Large downloads, and the start of unpacking them; everything else is in the log."""
    return bool(re.match(r"\s*Downloading .*[MG]B\)", line)) or line.startswith("[detectron2]")


class Environment:
    """A Python environment that the steps run in."""

    def __init__(self, python: Path, label: str, *, keep_installed: bool) -> None:
        self.python = str(python)
        self.label = label
        self.keep_installed = keep_installed
        key = hashlib.sha256(self.python.encode()).hexdigest()[:12]
        self.stamps = {kind: STATE / f"{key}.{kind}" for kind in ("stamp", "tests-stamp")}
        self.log = STATE / f"{key}.log"
        self.constraints = STATE / f"{key}-constraints.txt"

    def evaluate(self, code: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.python, "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            text=True,
            capture_output=True,
            check=False,
        )

    def is_ready(self, tests: bool) -> bool:
        """Set up before from the same files, and nothing was removed since."""
        stamp = self.stamps["tests-stamp" if tests else "stamp"]
        return (
            stamp.is_file()
            and stamp.read_text(encoding="utf-8") == fingerprint()
            and Path(self.python).exists()
            and self.evaluate(LOOK, *NEEDED, *(TESTS_NEED if tests else ())).returncode == 0
        )

    def mark_ready(self, tests: bool) -> None:
        for kind, stamp in self.stamps.items():
            if tests or kind == "stamp":
                stamp.write_text(fingerprint(), encoding="utf-8")

    def run(self, *arguments: str) -> None:
        """Run this environment's python; the whole output goes to the log, the news to the screen.

        Raises:
            SetupError: names the log, after its last lines were shown.
        """
        settings = {
            "PIP_CONSTRAINT": str(self.constraints),
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PYTHONUNBUFFERED": "1",
        }
        process = subprocess.Popen(
            [self.python, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **settings},
        )
        recent: list[str] = []
        with Heartbeat() as heartbeat, open(self.log, "a", encoding="utf-8") as log:
            for line in process.stdout or ():
                log.write(line)
                if not line.startswith("WARNING: Location"):
                    recent = [*recent[-29:], line]
                if worth_showing(line):
                    heartbeat.show(line.strip())
            code = process.wait()
        if code != 0:
            sys.stderr.write("".join(recent))
            raise SetupError(
                f"the step failed (exit {code}); everything it said is in {self.log}; for machines "
                "without a package index see docs/installation.md"
            )

    def pip_install(self, *arguments: str) -> None:
        self.run("-m", "pip", "install", "--progress-bar", "off", *arguments)


def fingerprint() -> str:
    """Changes when a file that the environment was made from does, or when the checkout moves."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in DEPENDS_ON:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def make_venv(folder: Path) -> None:
    say(f"creating the virtual environment {folder}")
    result = subprocess.run(
        [sys.executable, "-m", "venv", str(folder)],
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        check=False,
    )
    if result.returncode != 0:
        raise SetupError(f"cannot create {folder}: {(result.stdout + result.stderr).strip()}")


def write_constraints(environment: Environment) -> None:
    """Pin the tested set, or what is installed in a user's environment that has torch."""
    installed: list[str] = []
    if environment.keep_installed:
        installed = environment.evaluate(LIST_INSTALLED).stdout.split()
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if any(line.startswith("torch==") for line in installed):
        say("torch is there already: keeping every installed version, adding what is missing")
        kept = [line for line in installed if not line.lower().startswith("fiber")]
        pins = "\n".join(sorted(kept)) + "\n"
    elif sys.version_info < PINS_NEED:
        wanted = ".".join(map(str, PINS_NEED))
        found = ".".join(map(str, sys.version_info[:2]))
        say(f"the tested versions need Python {wanted}, this is {found}: using what fits instead")
        pins = ""
    environment.constraints.write_text(pins, encoding="utf-8")


def add_browser(environment: Environment) -> None:
    """A headless Chromium for one test, which is skipped where there is none: no failure."""
    if environment.keep_installed:
        say("left out here; the test that wants it is skipped (pip install PyQt6-WebEngine)")
        return
    try:
        environment.pip_install("--only-binary", ":all:", "PyQt6-WebEngine")
    except SetupError as error:
        say(f"going on without it, and the test that wants it will be skipped: {error}")


def add_dev(environment: Environment) -> None:
    """What the extra ``dev`` of the installed project asks for.

    Raises:
        SetupError: it cannot be read or installed.
    """
    found = environment.evaluate(LIST_DEV)
    if found.returncode != 0:
        raise SetupError(f"the project's requirements cannot be read: {found.stderr.strip()}")
    environment.pip_install(*found.stdout.split())


def set_up(environment: Environment, tests: bool) -> None:
    """Run the steps. Building this project comes after setuptools, Detectron2 after torch."""
    steps: list[tuple[str, Callable[[], None]]] = []
    if not environment.is_ready(tests=False):
        steps += [
            (
                "torch and torchvision (a few GB: the longest step)",
                lambda: environment.pip_install(
                    "torch", "torchvision", "numpy", "setuptools", "wheel"
                ),
            ),
            (
                "the other libraries and this project (editable, with its compiled operators)",
                lambda: environment.pip_install("--no-build-isolation", "-e", ".[demo,fast]"),
            ),
            ("Detectron2", lambda: environment.run("tools/install_detectron2.py")),
        ]
    if tests:
        steps += [
            ("what tests and documentation need", lambda: add_dev(environment)),
            # Its requirements would bring a second cv2, one that needs libGL.
            ("lvis", lambda: environment.pip_install("--no-deps", "lvis")),
            ("a browser, for the test of the demo's page", lambda: add_browser(environment)),
        ]
    write_constraints(environment)
    environment.log.write_text("", encoding="utf-8")
    begin = time.monotonic()
    for number, (title, step) in enumerate(steps, start=1):
        say(f"{number}/{len(steps)} {title}")
        started = time.monotonic()
        step()
        say(f"{number}/{len(steps)} done in {time.monotonic() - started:.0f} s")
    report = environment.evaluate(REPORT)
    if report.returncode != 0:
        sys.stderr.write(report.stderr)
        raise SetupError("everything is installed, but importing it fails (see above)")
    say(report.stdout.strip())
    environment.mark_ready(tests)
    say(f"{environment.label} is ready after {time.monotonic() - begin:.0f} s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("where", help="folder of the virtual environment, or 'current'")
    parser.add_argument(
        "--tests", action="store_true", help="also what tests and documentation need"
    )
    args = parser.parse_args(argv)
    where = args.where
    if where == "current":
        label = f"the current environment ({sys.prefix})"
        environment = Environment(Path(sys.executable), label, keep_installed=True)
    else:
        # Not resolved: the link is what makes it the environment's python.
        python = Path(where).absolute() / "bin" / "python"
        environment = Environment(python, f"the environment {where}", keep_installed=False)
    os.chdir(ROOT)
    try:
        if environment.is_ready(args.tests):
            say(f"{environment.label} is ready")
            return 0
        STATE.mkdir(parents=True, exist_ok=True)
        if not Path(environment.python).exists():
            make_venv(Path(environment.python).parents[1])
        set_up(environment, args.tests)
    except (SetupError, OSError) as error:
        print(f"[setup] error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
