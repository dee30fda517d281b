"""Pictures of boxes with the words they are tied to: ground truth beside predictions."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from transformers import PreTrainedTokenizerBase

from fiber_d2.colors import PALETTE, WordColors
from fiber_d2.drawing import contact_sheet, draw_found, draw_record, save_png
from fiber_d2.heatmaps import draw_heatmaps
from fiber_d2.plots import plot_class_ap, plot_precision_recall, save_plots
from fiber_d2.structures import Prompt
from fiber_d2.text import clean_name

__all__ = [
    "PredictionDrawer",
    "WordColors",
    "colors_of_records",
    "contact_sheet",
    "draw_found",
    "draw_heatmaps",
    "draw_predictions",
    "draw_record",
    "ground_truth_of",
    "plot_class_ap",
    "plot_precision_recall",
    "prompt_words",
    "save_plots",
    "save_png",
]

GroundTruth = tuple[np.ndarray, list[str]]
# Expressions and sentences come many to an image; pictures should show different ones.
_PICTURES_PER_FILE = 2


def prompt_words(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each target's tokens; separate stretches are joined by " ... ".

    Args:
        prompt: a prompt with K targets.
        tokenizer: the one the prompt was made with.

    Returns:
        K texts, empty for a target without tokens.

    Raises:
        ValueError: where the tokenizer is another one.
    """
    # A caption may have been cut; its text is whole.
    encoding = tokenizer(
        prompt.text, return_offsets_mapping=True, truncation=True, max_length=prompt.num_tokens
    )
    if encoding["input_ids"] != prompt.input_ids.tolist():
        raise ValueError(f"The tokenizer did not make the tokens of the prompt {prompt.text!r}.")
    begins, ends = zip(*encoding["offset_mapping"])
    words = []
    for row in (prompt.positive_map > 0).tolist():
        stretches = [
            [token for token, _ in group]
            for marked, group in itertools.groupby(enumerate(row), lambda pair: pair[1])
            if marked
        ]
        words.append(
            " ... ".join(prompt.text[begins[s[0]] : ends[s[-1]]].strip() for s in stretches)
        )
    return words


def ground_truth_of(record: Mapping[str, Any], metadata: Any) -> GroundTruth:
    """Boxes of a dataset record (crowds left out), and the words each is tied to.

    Args:
        record: a record before the mapper.
        metadata: of its data set; ``ground_truth`` says which words: "detection": the class name.
            "grounding": the phrase; a box that several phrases of ``tokens_positive_eval`` share
            comes once for each. "refexp": the whole caption.

    Returns:
        float ``(N, 4)`` XYXY in pixels of the original image, and N texts.

    Raises:
        ValueError: for another kind of ``ground_truth``.
    """
    boxes, words = [], []
    for annotation in record.get("annotations", ()):
        if annotation.get("iscrowd", 0):
            continue
        named = _words_of(record, annotation, metadata)
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        boxes += [box] * len(named)
        words += named
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4), words


def colors_of_records(records: Iterable[Mapping[str, Any]], metadata: Any) -> WordColors:
    """Colours for all pictures of a data set: words of one image differ, a word keeps its own.

    Args:
        records, metadata: see :func:`ground_truth_of`.
    """
    groups = [
        {
            word
            for annotation in record.get("annotations", ())
            for word in _words_of(record, annotation, metadata)
        }
        for record in records
    ]
    classes = metadata.get("thing_classes") or ()
    if metadata.get("ground_truth") == "detection" and len(classes) <= len(PALETTE):
        # Then predictions of classes that are not in the image differ, too.
        groups.append({clean_name(name).strip() for name in classes})
    return WordColors(groups)


def draw_predictions(
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    ground_truth: Sequence[GroundTruth],
    *,
    tokenizer: PreTrainedTokenizerBase,
    score_thresh: float = 0.4,
    max_boxes: int = 30,
    colors: WordColors | None = None,
) -> list[np.ndarray]:
    """One picture for each image of a batch.

    With a caption of its own (grounding, referring expressions) the best box of each target is
    drawn; of a caption made of class names all boxes above ``score_thresh``.

    Args:
        inputs: model inputs ("image" uint8 ``(3, h, w)`` BGR, "prompt", "height", "width").
        outputs: model outputs, boxes in pixels of the original image (height, width).
        ground_truth: per image boxes and words; see ``ground_truth_of``.
        tokenizer: the one the prompts were made with.
        score_thresh: scores are in 0..1.
        max_boxes: no more than this many boxes, the best.
        colors: of words that appear in further pictures, too; by default those of these.
    """
    colors = colors or WordColors(words for _, words in ground_truth)
    pictures = []
    for item, output, (gt_boxes, gt_words) in zip(inputs, outputs, ground_truth):
        image = item["image"].permute(1, 2, 0).flip(-1).cpu().numpy()
        prompts = [item["prompt"]] if isinstance(item["prompt"], Prompt) else item["prompt"]
        words = {
            int(target): text
            for prompt in prompts
            for target, text in zip(prompt.target_ids, prompt_words(prompt, tokenizer))
        }
        if len(words) == 1 and len(set(gt_words)) == 1:
            # An expression may be tied to its head noun only; name it by the whole, like the truth.
            words = dict.fromkeys(words, gt_words[0])
        has_caption = "caption" in item
        instances = output["instances"].to("cpu")
        shown = (
            _best_per_target(instances)
            if has_caption
            else instances[instances.scores >= score_thresh]
        )[:max_boxes]
        height, width = image.shape[:2]
        ratio = np.tile([width / item["width"], height / item["height"]], 2)
        pictures.append(
            draw_record(
                np.ascontiguousarray(image),
                gt_boxes * ratio,
                gt_words,
                shown.pred_boxes.tensor.numpy() * ratio,
                [words.get(target, f"target {target}") for target in shown.pred_classes.tolist()],
                shown.scores.tolist(),
                caption=item["caption"] if has_caption else " ".join(p.text for p in prompts),
                colors=colors,
            )
        )
    return pictures


class PredictionDrawer:
    """Draws the first images of an evaluation and writes them as PNG files with a contact sheet.

    Of an image that comes with many captions only the first two are drawn. Only the main process
    draws. ``process`` is called for each batch, ``finish`` at the end.

    Args:
        output_dir: gets ``NNN_<image id>.png`` and ``contact_sheet.png``.
        limit: number of images.
        tokenizer: the one the prompts were made with.
        score_thresh: lowest score of a box of a detection picture.
        colors: of words that appear in several pictures.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        limit: int = 12,
        *,
        tokenizer: PreTrainedTokenizerBase,
        score_thresh: float = 0.4,
        colors: WordColors | None = None,
    ) -> None:
        self._output_dir = Path(output_dir)
        self._limit = limit if comm.is_main_process() else 0
        self._tokenizer = tokenizer
        self._score_thresh = score_thresh
        self._colors = colors or WordColors()
        self._pictures: list[tuple[str, np.ndarray]] = []
        self._drawn: Counter[str] = Counter()

    @property
    def full(self) -> bool:
        """Whether no further image will be drawn, so that ground truth need not be looked up."""
        return len(self._pictures) >= self._limit

    def process(
        self,
        inputs: Sequence[Mapping[str, Any]],
        outputs: Sequence[Mapping[str, Any]],
        ground_truth: Sequence[GroundTruth],
    ) -> None:
        """Draw a batch; the arguments are those of ``draw_predictions``."""
        for item, output, truth in zip(inputs, outputs, ground_truth):
            file_name = item.get("file_name", item["image_id"])
            if self.full or self._drawn[file_name] == _PICTURES_PER_FILE:
                continue
            self._drawn[file_name] += 1
            (picture,) = draw_predictions(
                [item],
                [output],
                [truth],
                tokenizer=self._tokenizer,
                score_thresh=self._score_thresh,
                colors=self._colors,
            )
            name = re.sub(r"[^\w.-]+", "_", str(item["image_id"]))
            self._pictures.append((f"{len(self._pictures):03d}_{name}.png", picture))

    def finish(self) -> list[Path]:
        """Write the files and return their paths, the contact sheet last."""
        if not self._pictures:
            return []
        paths = [self._output_dir / name for name, _ in self._pictures]
        for path, (_, picture) in zip(paths, self._pictures):
            save_png(path, picture)
        paths.append(self._output_dir / "contact_sheet.png")
        save_png(paths[-1], contact_sheet([picture for _, picture in self._pictures]))
        return paths


def _words_of(record: Mapping[str, Any], annotation: Mapping[str, Any], metadata: Any) -> list[str]:
    kind = metadata.get("ground_truth")
    if kind == "detection":
        return [clean_name(metadata.thing_classes[annotation["category_id"]]).strip()]
    if kind == "grounding":
        return [_text_of(record["caption"], spans) for spans in _phrases(record, annotation)]
    if kind == "refexp":
        return [record["caption"]]
    raise ValueError(
        f"ground_truth in the metadata of {metadata.get('name')!r} is {kind!r}; it must be "
        "'detection', 'grounding' or 'refexp'."
    )


def _phrases(
    record: Mapping[str, Any], annotation: Mapping[str, Any]
) -> list[list[tuple[int, int]]]:
    """The phrases an annotation belongs to, each as a list of spans."""
    own = [(begin, end) for begin, end in annotation["tokens_positive"]]
    phrases = [[(b, e) for b, e in spans] for spans in record.get("tokens_positive_eval", [own])]
    return [spans for spans in phrases if set(spans) & set(own)]


def _text_of(caption: str, spans: Sequence[tuple[int, int]]) -> str:
    return " ... ".join(caption[begin:end].strip() for begin, end in spans)


def _best_per_target(instances: Instances) -> Instances:
    """The highest-scoring box of each target, in the order of the targets."""
    order = torch.argsort(instances.scores, descending=True, stable=True)
    ranked = instances[order]
    by_target = torch.argsort(ranked.pred_classes, stable=True)
    targets = ranked.pred_classes[by_target]
    first = torch.ones_like(targets, dtype=torch.bool)
    first[1:] = targets[1:] != targets[:-1]
    return ranked[by_target[first]]
