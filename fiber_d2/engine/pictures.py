"""Pictures of an evaluation: images spread over the data set, or the best and the worst of it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from fiber_d2.data.images import read_image
from fiber_d2.data.records import ground_truth_kind
from fiber_d2.drawing import contact_sheet, draw_record, save_png
from fiber_d2.evaluation.overlap import box_overlap
from fiber_d2.structures import Prompt
from fiber_d2.text import load_tokenizer
from fiber_d2.visualization import (
    PredictionDrawer,
    colors_of_records,
    ground_truth_of,
    prompt_words,
)

OVERVIEW_CELL_WIDTH = 480
SPREAD, BEST_WORST = "spread", "best_worst"
# A box counts as found where the best-matching one overlaps it so much.
_FOUND_IOU = 0.5
# Wrong boxes are drawn from this score on.
_SHOWN_SCORE = 0.4
_MAX_WRONG = 10
# Pictures of a data set that TensorBoard gets one by one, besides their sheet.
_SINGLE_PICTURES = 4
# Of a file name: its number, with what it is the best or the worst of.
_TAG = re.compile(r"((?:[a-z]+_)?\d+)_")

Batch = Sequence[Mapping[str, Any]]


class PictureEvaluator(DatasetEvaluator):
    """Scores nothing: draws the first images of a data set beside its ground truth.

    Args:
        dataset: name in the catalogue.
        tokenizer: name of the one that the prompts are made with.
        output_dir: gets the PNG files and ``contact_sheet.png``.
        limit: number of images; only the main process draws.
    """

    def __init__(self, dataset: str, tokenizer: str, *, output_dir: str, limit: int) -> None:
        self._output_dir, self._limit = output_dir, limit
        self._tokenizer = load_tokenizer(tokenizer)
        # One look at the ground truth for the whole evaluation.
        records = DatasetCatalog.get(dataset)
        self._records = {record["image_id"]: record for record in records}
        self._metadata = _with_kind(dataset, ground_truth_kind(dataset, records))
        self._colors = colors_of_records(records, self._metadata)
        self.paths: list[Path] = []
        self.reset()

    def reset(self) -> None:
        self._drawer = PredictionDrawer(
            self._output_dir, self._limit, tokenizer=self._tokenizer, colors=self._colors
        )

    def process(self, inputs: Batch, outputs: Sequence[Mapping[str, Any]]) -> None:
        if self._drawer.full:
            return
        truth = [ground_truth_of(self._records[x["image_id"]], self._metadata) for x in inputs]
        self._drawer.process([self._with_image(item) for item in inputs], outputs, truth)

    def _with_image(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        """Predictions that were saved come without their pixels."""
        if "image" in item:
            return item
        pixels = read_image(self._records[item["image_id"]], "BGR").transpose(2, 0, 1)
        return {**item, "image": torch.as_tensor(np.ascontiguousarray(pixels))}

    def evaluate(self) -> None:
        self.paths = self._drawer.finish()

    def show(self, storage: EventStorage, name: str) -> None:
        """Hand the contact sheet to TensorBoard as ``name``, and some pictures, large enough to
        be looked at one by one, as ``name/<which>``."""
        for tag, image in self._images(name):
            storage.put_image(tag, image.transpose(2, 0, 1))

    def log_to(self, folder: str, name: str) -> None:
        """Write the same images for TensorBoard, where no training does it."""
        if self.paths:
            with SummaryWriter(folder) as writer:
                for tag, image in self._images(name):
                    writer.add_image(tag, image, dataformats="HWC")

    def _images(self, name: str) -> Iterator[tuple[str, np.ndarray]]:
        if not self.paths:
            return
        yield name, _read(self.paths[-1])
        for path in self._singles():
            # Which picture, not which image: a tag stays one row, whatever is in it later.
            yield f"{name}/{_TAG.match(path.name).group(1)}", _read(path)

    def _singles(self) -> list[Path]:
        """Pictures that are shown one by one, besides the sheet."""
        return self.paths[:-1][:_SINGLE_PICTURES]


@dataclass(frozen=True)
class Match:
    """An image, how well it went, and its ground truth with what was matched to it.

    Attributes:
        quality: see :func:`match_image`.
        image_id: of the record.
        overlaps: ``(G,)`` IoU of each ground-truth box with its match; 0 where there is none.
        matched: int ``(G,)`` row of ``instances``, -1 for none.
        instances: predictions, on the CPU.
        words: of each target, by ``pred_classes``.
        caption: what was asked.
    """

    quality: float
    image_id: Any
    overlaps: np.ndarray
    matched: np.ndarray
    instances: Instances
    words: Mapping[int, str]
    caption: str


def match_image(
    boxes: np.ndarray, targets: Sequence[int], instances: Instances
) -> tuple[float, np.ndarray, np.ndarray]:
    """How well the predictions of an image answer its ground truth.

    Each ground-truth box is matched to the prediction of its target (class or phrase) with the
    largest product of IoU and score. One prediction may be the match of several boxes.

    Args:
        boxes: ``(G, 4)`` XYXY, G at least 1.
        targets: of each box, as in ``pred_classes``.
        instances: predictions, boxes in the same pixels.

    Returns:
        The quality of the image in 0..1: the mean of these products over the ground truth, 0 for a
        box without match; the IoU ``(G,)`` with each match; its row ``(G,)``, -1 for none.
    """
    found = len(instances)
    if not found:
        return 0.0, np.zeros(len(boxes)), np.full(len(boxes), -1)
    predicted = instances.pred_boxes.tensor.detach().numpy().astype(np.float64)
    pairs = (len(boxes), found, 4)
    overlaps = box_overlap(
        np.broadcast_to(boxes[:, None], pairs).reshape(-1, 4),
        np.broadcast_to(predicted[None], pairs).reshape(-1, 4),
    ).reshape(pairs[:2])
    same = np.asarray(targets)[:, None] == instances.pred_classes.numpy()[None]
    products = np.where(same, overlaps * instances.scores.detach().numpy()[None], 0.0)
    best = products.argmax(axis=1)
    rows = np.arange(len(boxes))
    values = products[rows, best]
    matched = values > 0
    return (
        float(values.mean()),
        np.where(matched, overlaps[rows, best], 0.0),
        np.where(matched, best, -1),
    )


def truth_targets(record: Mapping[str, Any], kind: str) -> tuple[np.ndarray, list[int]]:
    """Ground-truth boxes and their targets, numbered as evaluation prompts number them.

    Args:
        record: before the mapper.
        kind: "detection": a target is a contiguous class id; "grounding": the index of a phrase (a
            box of several phrases comes once for each); "refexp": all boxes are of target 0.

    Returns:
        float64 ``(G, 4)`` XYXY in pixels of the original image, without crowds; and G targets.
    """
    annotations = record.get("annotations", ())
    own = [tuple((begin, end) for begin, end in a.get("tokens_positive", ())) for a in annotations]
    phrases = [
        {(begin, end) for begin, end in spans}
        for spans in record.get("tokens_positive_eval", dict.fromkeys(own))
    ]
    boxes, targets = [], []
    for annotation, spans in zip(annotations, own):
        if annotation.get("iscrowd", 0):
            continue
        if kind == "detection":
            of_box = [annotation["category_id"]]
        elif kind == "grounding":
            of_box = [index for index, phrase in enumerate(phrases) if phrase & set(spans)]
        else:
            of_box = [0]
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        boxes += [box] * len(of_box)
        targets += of_box
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4), targets


class BestWorstPictures(PictureEvaluator):
    """Draws the best and the worst images of a data set with matched ground truth.

    The quality of an image is that of :func:`match_image`; images without ground truth have none.
    Files are called ``worst_<rank>_<image id>.png`` and ``best_...``; of fewer than twice
    ``limit`` images none is drawn twice. All processes take part, the main one draws.

    Args:
        limit: number of images of either kind.
    """

    def reset(self) -> None:
        self._kept: list[Match] = []

    def process(self, inputs: Batch, outputs: Sequence[Mapping[str, Any]]) -> None:
        kind = self._metadata.ground_truth
        for item, output in zip(inputs, outputs):
            boxes, targets = truth_targets(self._records[item["image_id"]], kind)
            if not len(boxes):
                continue
            instances = output["instances"].to("cpu")
            prompts = [item["prompt"]] if isinstance(item["prompt"], Prompt) else item["prompt"]
            words = {
                int(target): text
                for prompt in prompts
                for target, text in zip(prompt.target_ids, prompt_words(prompt, self._tokenizer))
            }
            caption = item.get("caption") or " ".join(prompt.text for prompt in prompts)
            self._kept.append(
                Match(*_quality_first(item["image_id"], boxes, targets, instances), words, caption)
            )
        if len(self._kept) > 4 * self._limit:
            self._kept = self._extremes(self._kept)

    def _extremes(self, matches: Sequence[Match]) -> list[Match]:
        """The worst and the best of these, by ascending quality."""
        # Processes that even out their shares show an image twice.
        unique = {str(match.image_id): match for match in reversed(matches)}
        ranked = sorted(unique.values(), key=lambda match: (match.quality, str(match.image_id)))
        if len(ranked) <= 2 * self._limit:
            return ranked
        return ranked[: self._limit] + ranked[-self._limit :]

    def evaluate(self) -> None:
        gathered = comm.gather(self._extremes(self._kept), dst=0)
        self.paths = []
        if not comm.is_main_process() or not any(gathered):
            return
        ranked = self._extremes(list(itertools.chain.from_iterable(gathered)))
        half = min(self._limit, (len(ranked) + 1) // 2)
        named = [("worst", rank, match) for rank, match in enumerate(ranked[:half])]
        named += [("best", rank, m) for rank, m in enumerate(reversed(ranked[half:]))]
        pictures = []
        for kind, rank, match in named:
            pictures.append(self._draw(match))
            name = re.sub(r"[^\w.-]+", "_", str(match.image_id))
            self.paths.append(Path(self._output_dir, f"{kind}_{rank:03d}_{name}.png"))
            save_png(self.paths[-1], pictures[-1])
        self.paths.append(Path(self._output_dir, "contact_sheet.png"))
        save_png(self.paths[-1], contact_sheet(pictures))

    def _singles(self) -> list[Path]:
        by_kind = [[p for p in self.paths if p.name.startswith(k)] for k in ("worst_", "best_")]
        return [path for paths in by_kind for path in paths[: _SINGLE_PICTURES // 2]]

    def _draw(self, match: Match) -> np.ndarray:
        record = self._records[match.image_id]
        image = read_image(record, "RGB")
        boxes, targets = truth_targets(record, self._metadata.ground_truth)
        # Where a phrase has no token of its own, ground truth still knows its words.
        words = dict(match.words)
        true_boxes, true_words = ground_truth_of(record, self._metadata)
        if len(true_boxes) == len(targets):
            words.update(zip(targets, true_words))
        shown = match.instances[_rows_to_show(match)]
        num_found = int((match.overlaps >= _FOUND_IOU).sum())
        return draw_record(
            np.ascontiguousarray(image),
            boxes,
            [words.get(target, f"target {target}") for target in targets],
            shown.pred_boxes.tensor.detach().numpy(),
            [words.get(target, f"target {target}") for target in shown.pred_classes.tolist()],
            shown.scores.tolist(),
            caption=f"[{match.quality:.2f}, {num_found} of {len(boxes)} found] {match.caption}",
            colors=self._colors,
        )


def _quality_first(
    image_id: Any, boxes: np.ndarray, targets: Sequence[int], instances: Instances
) -> tuple[float, Any, np.ndarray, np.ndarray, Instances]:
    """The fields of a Match, with only those predictions that may be drawn."""
    quality, overlaps, matched = match_image(boxes, targets, instances)
    keep = np.unique(np.concatenate([matched[matched >= 0], _wrong_rows(instances, matched)]))
    places = np.where(matched >= 0, np.searchsorted(keep, matched), -1)
    return quality, image_id, overlaps, places, instances[torch.from_numpy(keep).long()]


def _wrong_rows(instances: Instances, matched: np.ndarray) -> np.ndarray:
    """The best predictions that nothing was matched to, above the score at which they show."""
    scores = instances.scores.detach().numpy()
    wrong = np.setdiff1d(np.flatnonzero(scores >= _SHOWN_SCORE), matched)
    return wrong[np.argsort(-scores[wrong], kind="stable")][:_MAX_WRONG]


def _rows_to_show(match: Match) -> torch.Tensor:
    """Matches in the order of the ground truth, then the others."""
    matched = list(dict.fromkeys(row for row in match.matched.tolist() if row >= 0))
    others = [row for row in range(len(match.instances)) if row not in set(matched)]
    return torch.tensor(matched + others, dtype=torch.int64)


def write_overview(output_dir: str, drawn: Sequence[PictureEvaluator]) -> Path | None:
    """All pictures of several test sets on one page, ``<output_dir>/pictures/contact_sheet.png``.

    Returns:
        its path, or None where nothing was drawn.
    """
    pictures = []
    for evaluator in drawn:
        for path in evaluator.paths[:-1]:  # the last one is the set's own sheet
            pictures.append(_read(path))
    if not pictures:
        return None
    path = Path(output_dir, "pictures", "contact_sheet.png")
    save_png(path, contact_sheet(pictures, cell_width=OVERVIEW_CELL_WIDTH))
    return path


def make_picture_evaluators(
    dataset: str, tokenizer: str, *, output_dir: str, limit: int, kind: str = SPREAD
) -> list[PictureEvaluator]:
    """What draws: one evaluator where this process has to, none where ``limit`` is 0.

    Args:
        kind: "spread" draws the first ``limit`` images, as they come; "best_worst" the ``limit``
            best and the ``limit`` worst ones.

    Raises:
        ValueError: for another kind.
    """
    if kind not in (SPREAD, BEST_WORST):
        raise ValueError(f"pictures_of is {kind!r}; it must be {SPREAD!r} or {BEST_WORST!r}.")
    if limit <= 0 or (kind == SPREAD and not comm.is_main_process()):
        return []
    draw = PictureEvaluator if kind == SPREAD else BestWorstPictures
    folder = os.path.join(output_dir, "pictures", dataset)
    return [draw(dataset, tokenizer, output_dir=folder, limit=limit)]


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def _with_kind(dataset: str, kind: str) -> Metadata:
    """The metadata, with ``ground_truth`` also where whoever registered the data did not say it."""
    return Metadata(**{**MetadataCatalog.get(dataset).as_dict(), "ground_truth": kind})
