"""Pictures of an evaluation, drawn while it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image

from fiber_d2.drawing import contact_sheet, save_png
from fiber_d2.text import load_tokenizer
from fiber_d2.visualization import PredictionDrawer, ground_truth_of

OVERVIEW_CELL_WIDTH = 480


class PictureEvaluator(DatasetEvaluator):
    """Scores nothing: draws the first images of a data set beside its ground truth.

    Args:
        dataset: name in the catalogue.
        tokenizer: name of the one that the prompts are made with.
        output_dir: gets the PNG files and ``contact_sheet.png``.
        limit: number of images; only the main process draws.
    """

    def __init__(self, dataset: str, tokenizer: str, *, output_dir: str, limit: int) -> None:
        self._drawer = PredictionDrawer(output_dir, limit, tokenizer=load_tokenizer(tokenizer))
        # One look at the ground truth for the whole evaluation.
        self._records = {record["image_id"]: record for record in DatasetCatalog.get(dataset)}
        self._metadata = _with_kind(dataset, self._records)
        self.paths: list[Path] = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        if self._drawer.full:
            return
        truth = [ground_truth_of(self._records[x["image_id"]], self._metadata) for x in inputs]
        self._drawer.process(inputs, outputs, truth)

    def evaluate(self) -> None:
        self.paths = self._drawer.finish()

    def show(self, storage: EventStorage, name: str) -> None:
        """Hand the contact sheet to TensorBoard under ``name``."""
        if self.paths:
            with Image.open(self.paths[-1]) as sheet:
                pixels = np.array(sheet.convert("RGB"))
            storage.put_image(name, pixels.transpose(2, 0, 1))


def write_overview(output_dir: str, drawn: Sequence[PictureEvaluator]) -> Path | None:
    """All pictures of several test sets on one page, ``<output_dir>/pictures/contact_sheet.png``.

    Returns:
        its path, or None where nothing was drawn.
    """
    pictures = []
    for evaluator in drawn:
        for path in evaluator.paths[:-1]:  # the last one is the set's own sheet
            with Image.open(path) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
    if not pictures:
        return None
    path = Path(output_dir, "pictures", "contact_sheet.png")
    save_png(path, contact_sheet(pictures, cell_width=OVERVIEW_CELL_WIDTH))
    return path


def _with_kind(dataset: str, records: Mapping[Any, Mapping[str, Any]]) -> Metadata:
    """The metadata, with ``ground_truth`` where whoever registered the data did not say it."""
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("ground_truth"):
        return metadata
    has_caption = "caption" in next(iter(records.values()))
    return Metadata(
        **{**metadata.as_dict(), "ground_truth": "grounding" if has_caption else "detection"}
    )


def make_picture_evaluators(
    dataset: str, tokenizer: str, *, output_dir: str, limit: int
) -> list[PictureEvaluator]:
    """One PictureEvaluator in the main process, none elsewhere or where ``limit`` is 0."""
    if limit <= 0 or not comm.is_main_process():
        return []
    folder = os.path.join(output_dir, "pictures", dataset)
    return [PictureEvaluator(dataset, tokenizer, output_dir=folder, limit=limit)]
