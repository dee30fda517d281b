"""Where the numbers, pictures and texts of a training go: terminal, json, TensorBoard, wandb."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from .durable import write_atomically

# Holds the id of the wandb run, so that a resumed training goes on with its curves.
WANDB_RUN_FILE = "wandb_run.txt"


class TextLog:
    """Texts that wait for a writer, which Detectron2's storage has no room for."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, str, int]] = []

    def put(self, name: str, text: str, iteration: int) -> None:
        self._waiting.append((name, text, iteration))

    def take(self) -> list[tuple[str, str, int]]:
        """What was put since the last call: (name, text in Markdown, iteration)."""
        waiting, self._waiting = self._waiting, []
        return waiting


class TensorBoardWriter(TensorboardXWriter):
    """Detectron2's writer, for texts as well.

    Args:
        log_dir: the folder of the event files.
        texts: where they come from.
        window: numbers are the median of so many iterations.
    """

    def __init__(self, log_dir: str, texts: TextLog, window: int = 20) -> None:
        super().__init__(log_dir, window)
        self._texts = texts

    def write(self) -> None:
        super().write()
        for name, text, iteration in self._texts.take():
            self._writer.add_text(name, text, iteration)


class WandbWriter(EventWriter):
    """Scalars and pictures for a run of wandb.

    It has to come before TensorBoard's writer, which takes the pictures away.

    Args:
        output_dir: of the training; remembers which run of wandb it is.
        options: of ``wandb.init``, such as ``project``, ``name`` or ``mode="offline"``.
        window: numbers are the median of so many iterations.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, output_dir: str, options: Mapping[str, Any], window: int = 20) -> None:
        self._wandb = import_wandb()
        marker = Path(output_dir, WANDB_RUN_FILE)
        known = {"id": marker.read_text().strip()} if marker.is_file() else {}
        self._run = self._wandb.init(**{"dir": output_dir, "resume": "allow", **known, **options})
        write_atomically(str(marker), lambda file: file.write(f"{self._run.id}\n".encode()))
        self._window = window
        self._last_write = -1

    def write(self) -> None:
        storage = get_event_storage()
        rows: dict[int, dict[str, Any]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window).items():
            if iteration > self._last_write:
                rows[iteration][name] = value
        for name, picture, iteration in storage._vis_data:
            pixels = np.ascontiguousarray(np.asarray(picture).transpose(1, 2, 0))
            rows[iteration][name] = self._wandb.Image(pixels)
        # Steps have to rise.
        for iteration in sorted(rows):
            self._run.log(rows[iteration], step=iteration)
            self._last_write = max(self._last_write, iteration)

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> ModuleType:
    """The module, which is no requirement of this package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            "train.wandb is set, but wandb is not installed: run `pip install wandb`, or leave "
            "train.wandb at None. TensorBoard and training.jsonl hold the same numbers."
        ) from error
    return wandb


def build_writers(
    output_dir: str,
    max_iter: int,
    *,
    window: int = 20,
    texts: TextLog | None = None,
    wandb: Mapping[str, Any] | None = None,
) -> list[EventWriter]:
    """Progress on the terminal, ``training.jsonl`` and TensorBoard curves in ``output_dir``.

    ``metrics.json``, the name Detectron2 gives the first of the files, holds the final results.

    Args:
        window: numbers in files are the median of so many iterations: of one log period, so that
            they do not depend on what was before it, or whether the run was interrupted there.
        texts: for TensorBoard.
        wandb: options of ``wandb.init``; None does without.

    Raises:
        ValueError: wandb is asked for, but not installed.
    """
    os.makedirs(output_dir, exist_ok=True)
    writers: list[EventWriter] = [
        CommonMetricPrinter(max_iter),
        JSONWriter(os.path.join(output_dir, "training.jsonl"), window),
    ]
    if wandb is not None:
        writers.append(WandbWriter(output_dir, wandb, window))
    folder = os.path.join(output_dir, "tensorboard")
    return [*writers, TensorBoardWriter(folder, texts or TextLog(), window)]
