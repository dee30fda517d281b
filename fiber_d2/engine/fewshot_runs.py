"""Trainings and evaluations of a few-shot protocol, each in a process of its own, once each."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiber_d2.checkpoint.files import LAST_CHECKPOINT
from fiber_d2.files import save_json

from .best import BEST_CHECKPOINT, BEST_FILE
from .errors import RunError

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
OUTPUT_FILE = "output.txt"
# Seconds between two looks at a running process, and between two lines about it.
_POLL_SECONDS = 0.5
_REPORT_SECONDS = 60.0
# What a process that is told to end may take, to finish its batch and to save.
_GRACE_SECONDS = 90.0
_TAIL_LINES = 15


@dataclass(frozen=True)
class Run:
    """One call of the training program.

    Attributes:
        title: for people.
        folder: where everything is written, ``run.json`` with what came out last.
        arguments: of :mod:`fiber_d2.engine.main`, without ``--resume``.
        settings: what the outcome depends on, as JSON values; a finished run counts for the same
            settings only.
        max_iter: iterations of a training, 0 for an evaluation.
    """

    title: str
    folder: Path
    arguments: tuple[str, ...]
    settings: Mapping[str, Any]
    max_iter: int = 0

    def note(self) -> dict[str, Any]:
        """What ``run.json`` says, empty where there is none.

        Raises:
            ValueError: it cannot be read, or it is of other settings.
        """
        path = self.folder / RUN_FILE
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text())
            settings = found["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete the folder.") from error
        if settings != self.settings:
            names = sorted(
                key
                for key in {*settings, *self.settings}
                if settings.get(key) != self.settings.get(key)
            )
            raise ValueError(
                f"{self.folder} holds a run of other settings (another {', '.join(names)}): choose "
                "another --output, or delete the folder."
            )
        return found

    @property
    def results(self) -> dict[str, Any] | None:
        """What a finished run has found, None where it has not finished."""
        return self.note().get("results")


def digest_of(text: str) -> str:
    """A short digest of a configuration."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def state_of_file(path: str) -> dict[str, Any]:
    """Path, size and time of a checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
    """
    state = os.stat(path)
    return {"path": os.path.abspath(path), "size": state.st_size, "mtime_ns": state.st_mtime_ns}


def execute(
    run: Run, collect: Callable[[Path], dict[str, Any]], *, keep: str = "best"
) -> dict[str, Any]:
    """Do a run, or the rest of one that was interrupted, and note what came out.

    Args:
        collect: makes the results out of the folder of a finished run.
        keep: which checkpoints stay: "all", "best", or "none".

    Returns:
        The results, with ``seconds``, those before an interruption included.

    Raises:
        RunError: the process failed; the message says where its output is.
    """
    note = run.note()
    before = float(note.get("seconds", 0.0))
    run.folder.mkdir(parents=True, exist_ok=True)
    going_on = (run.folder / LAST_CHECKPOINT).exists()
    if not note and going_on:
        raise ValueError(
            f"{run.folder} holds checkpoints of something else: choose another --output, or delete "
            "the folder."
        )
    started = time.monotonic()

    def save(**more: Any) -> None:
        seconds = before + time.monotonic() - started
        entry = {"settings": run.settings, "arguments": run.arguments, "seconds": seconds, **more}
        save_json(entry, run.folder / RUN_FILE)

    save()
    command = [sys.executable, "-m", "fiber_d2.engine.main"]
    # Options end where key=value begins.
    command += [*(["--resume"] if going_on else []), *run.arguments]
    if going_on:
        logger.info("%s: going on after an interruption", run.title)
    try:
        _call(command, run)
    finally:
        save()
    results = collect(run.folder)
    results["seconds"] = round(before + time.monotonic() - started, 1)
    _delete_checkpoints(run.folder, keep)
    save(results=results)
    return results


def _call(command: Sequence[str], run: Run) -> None:
    path = run.folder / OUTPUT_FILE
    # A fault of an earlier attempt is not one of this.
    (run.folder / "error.log").unlink(missing_ok=True)
    with open(path, "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        with _ending(process):
            _wait(process, run)
    if process.returncode:
        lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        raise RunError(
            f"The run of {run.title} ended with exit code {process.returncode}; its output, in "
            f"{path}, ends with\n" + "\n".join(f"  {line}" for line in lines) + "\n"
            "What is finished stays: mend the cause and give the same command again."
        )


def _wait(process: subprocess.Popen[bytes], run: Run) -> None:
    reported = time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            logger.info("%s: %s", run.title, progress(run) or "at work")


@contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever ends this program ends the process as well, which may save before."""

    def end(number: int, frame: Any) -> None:
        logger.warning("Ended by a signal, the run at work saves; the same command goes on.")
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException as error:
        if process.poll() is None:
            interrupted = isinstance(error, KeyboardInterrupt)
            # A terminal has told the process, too; a second signal is none too many for it.
            process.send_signal(signal.SIGINT if interrupted else signal.SIGTERM)
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def progress(run: Run) -> str:
    """Where a training is, "" where that cannot be told yet."""
    if not run.max_iter:
        return ""
    last = _last_line(run.folder / "training.jsonl")
    if "iteration" not in last:
        return ""
    text = f"iteration {last['iteration'] + 1} of at most {run.max_iter}"
    best_file = run.folder / BEST_FILE
    best = json.loads(best_file.read_text()) if best_file.exists() else {}
    if best.get("best"):
        text += f", {best['metric']} {best['best']['value']:.2f} at best"
    return text


def _last_line(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16384))
            return json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        # Not there yet, or a line being written.
        return {}


def _delete_checkpoints(folder: Path, keep: str) -> None:
    if keep == "all":
        return
    for path in folder.glob("model_*.pth"):
        if keep == "none" or path.stem != BEST_CHECKPOINT:
            path.unlink()
    (folder / LAST_CHECKPOINT).unlink(missing_ok=True)
