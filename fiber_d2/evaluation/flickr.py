"""Flickr30k Entities: is one of the first k boxes of a phrase on what the phrase names?"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from tabulate import tabulate

from fiber_d2.evaluation.entities import EntityImage, Phrase, image_key, read_entities
from fiber_d2.evaluation.overlap import NEVER, first_hit_ranks
from fiber_d2.evaluation.records import Record, gather_records, keep_first
from fiber_d2.evaluation.saved import foreign_error, read_records
from fiber_d2.files import save_json
from fiber_d2.structures import Prompt

logger = logging.getLogger(__name__)

PROTOCOLS = ("separate", "merged", "both")
# Ends every phrase's list, so that a phrase without prediction still has a (missing) box.
_FILLER = [0.0, 0.0, 0.0, 0.0]


def group_by_phrase(
    boxes: np.ndarray, scores: np.ndarray, phrases: np.ndarray, num_phrases: int
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """The boxes of a sentence, sorted out by phrase.

    Args:
        boxes: ``(N, 4)`` XYXY; scores: ``(N,)``; phrases: int ``(N,)``, index of the phrase.
        num_phrases: number of phrases of the sentence.

    Returns:
        Per phrase the boxes, best first, with [0, 0, 0, 0] behind the last; and the scores.

    Raises:
        ValueError: for a phrase index outside 0..num_phrases-1.
    """
    grouped = _split_by_phrase(boxes, scores, phrases, num_phrases)
    return _as_lists(*grouped)


def _split_by_phrase(
    boxes: np.ndarray, scores: np.ndarray, phrases: np.ndarray, num_phrases: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """As ``group_by_phrase``, but arrays, and nothing behind the last box."""
    if len(phrases) and not 0 <= phrases.min() <= phrases.max() < num_phrases:
        raise ValueError(
            f"Predictions name phrases {phrases.min()}..{phrases.max()}, but the sentence has "
            f"{num_phrases} (numbered from 0)."
        )
    order = np.lexsort((-scores, phrases))
    ends = np.bincount(phrases, minlength=num_phrases).cumsum().tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends)]
    boxes, scores = boxes[order], scores[order]
    return [boxes[part] for part in parts], [scores[part] for part in parts]


def _as_lists(
    boxes: Sequence[np.ndarray], scores: Sequence[np.ndarray]
) -> tuple[list[list[list[float]]], list[list[float]]]:
    """What files of predictions hold of a sentence."""
    return [part.tolist() + [_FILLER] for part in boxes], [part.tolist() for part in scores]


def phrase_recall(
    images: Mapping[str, EntityImage],
    records: Sequence[Record],
    *,
    topk: Sequence[int] = (1, 5, 10, -1),
    iou_thresh: float = 0.5,
    protocol: str = "separate",
) -> dict[int, dict[str, float]]:
    """Recall of saved predictions.

    Args:
        images: ground truth by ``image_key``.
        records: one per sentence: ``{"image_id", "sentence_id", "boxes": [phrase][rank][4]}``,
            boxes XYXY best first, phrases in order of appearance. Of repeated records the first
            counts; records of sentences without an evaluable phrase do not.
        topk: boxes looked at per phrase; -1 looks at all.
        iou_thresh: a box hits at this IoU (inclusive, continuous coordinates).
        protocol: "separate": a hit on any one box of the entity counts. "merged": the target is
            the one box that encloses all of the entity's.

    Returns:
        ``recall[k][category]`` in 0..1; categories are "all" and the phrase types that occur. A
        phrase counts once in "all" and once per listed type.

    Raises:
        RuntimeError: where a sentence is missing or has another number of phrases.
        ValueError: where there is nothing to evaluate, or an argument is out of range.
    """
    (recall,) = _recall_by_protocol(images, records, topk, iou_thresh, [protocol])
    return recall


def _recall_by_protocol(
    images: Mapping[str, EntityImage],
    records: Sequence[Record],
    topk: Sequence[int],
    iou_thresh: float,
    protocols: Sequence[str],
) -> list[dict[int, dict[str, float]]]:
    """``phrase_recall`` of each protocol; phrases and predictions are paired once."""
    for protocol in protocols:
        if protocol not in ("separate", "merged"):
            raise ValueError(f"protocol must be 'separate' or 'merged', got {protocol!r}.")
    if not topk or any(k != -1 and k < 1 for k in topk):
        raise ValueError(f"topk must hold positive numbers or -1 (all boxes), got {topk}.")
    keys, phrases, predictions = [], [], []
    for key, phrase, boxes in _pair_phrases(images, records):
        keys.append(key)
        phrases.append(phrase)
        predictions.append(boxes)
    members: dict[str, list[int]] = defaultdict(list)
    members["all"] = list(range(len(phrases)))
    for index, phrase in enumerate(phrases):
        for name in phrase.types:
            members[name].append(index)
    found = []
    for protocol in protocols:
        boxes_of = {
            key: (image.merged() if protocol == "merged" else image).boxes
            for key, image in images.items()
        }
        targets = [boxes_of[key][phrase.entity] for key, phrase in zip(keys, phrases)]
        ranks = first_hit_ranks(predictions, targets, threshold=iou_thresh)
        found.append(
            {
                k: {
                    name: float((ranks[indices] < (NEVER if k == -1 else k)).mean())
                    for name, indices in members.items()
                }
                for k in topk
            }
        )
    return found


def _pair_phrases(
    images: Mapping[str, EntityImage], records: Sequence[Record]
) -> Iterator[tuple[str, Phrase, Sequence[Sequence[float]]]]:
    """The image of every evaluable phrase, the phrase, and its predicted boxes ``(p, 4)``."""
    by_sentence, repeats = keep_first(
        records, lambda record: (image_key(record["image_id"]), int(record["sentence_id"]))
    )
    if repeats:
        logger.warning("%d repeated sentences: the first prediction of each counts.", repeats)
    unused = set(by_sentence)
    missing = []
    found = False
    for key, image in images.items():
        for sentence in range(len(image.sentences)):
            phrases = image.evaluable(sentence)
            if not phrases:
                continue
            found = True
            record = by_sentence.get((key, sentence))
            if record is None:
                missing.append(f"{key}_{sentence}")
                continue
            unused.discard((key, sentence))
            if len(record["boxes"]) != len(phrases):
                raise RuntimeError(
                    f"Sentence {key}_{sentence} has {len(phrases)} phrases with boxes "
                    f"({', '.join(repr(phrase.text) for phrase in phrases)}), but its prediction "
                    f"has {len(record['boxes'])}. The data set's tokens_positive_eval must list "
                    "the same phrases as the Entities files."
                )
            for phrase, boxes in zip(phrases, record["boxes"]):
                yield key, phrase, boxes
    if not found:
        raise ValueError("The ground truth has no sentence with a phrase that has boxes.")
    if missing:
        raise RuntimeError(
            f"{len(missing)} sentences have no prediction, for example "
            f"{', '.join(missing[:5])}. Every sentence with evaluable phrases must be predicted."
        )
    surprising = [key for key in unused if any(len(boxes) for boxes in by_sentence[key]["boxes"])]
    if surprising:
        logger.warning(
            "Ignored the predictions of %d sentences without evaluable phrases.", len(surprising)
        )


class FlickrRecallEvaluator(DatasetEvaluator):
    """Phrase recall R@k on Flickr30k Entities, or any data set with files of that form.

    The model input dicts need "original_img_id", "sentence_id" and "prompt" (one target per
    evaluable phrase, in order of appearance); ``pred_classes`` is the index of the phrase.

    Results, in percent: ``{"grounding": {"R@1", ..., "upper_bound", "R@1_<type>", ...}}``, where
    the upper bound looks at all boxes of a phrase. With ``protocol="both"`` the keys of the merged
    protocol carry the prefix "merged/".

    Args:
        dataset_name: registered data set; its metadata give ``entities_root`` and ``split``.
        entities_root: folder with <split>.txt, Annotations/ and Sentences/.
        split: name of the list of images.
        topk, iou_thresh, protocol: as in ``phrase_recall``; protocol may be "both".
        output_dir: where to save ``flickr_predictions.json``, if anywhere.
        distributed: gather the predictions of all processes.

    Raises:
        ValueError, FileNotFoundError: where ground truth is not named or not there.
    """

    def __init__(
        self,
        dataset_name: str | None = None,
        *,
        entities_root: str | os.PathLike[str] | None = None,
        split: str | None = None,
        topk: Sequence[int] = (1, 5, 10, -1),
        iou_thresh: float = 0.5,
        protocol: str = "separate",
        output_dir: str | os.PathLike[str] | None = None,
        distributed: bool = True,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}.")
        if dataset_name is not None:
            metadata = MetadataCatalog.get(dataset_name)
            entities_root = entities_root or metadata.get("entities_root")
            split = split or metadata.get("split")
        if entities_root is None or split is None:
            raise ValueError(
                f"Flickr evaluation of {dataset_name!r} needs entities_root and split, as "
                "arguments or in the data set's metadata."
            )
        self.images = read_entities(entities_root, split)
        self._topk = tuple(topk)
        self._iou_thresh = iou_thresh
        self._protocols = ("separate", "merged") if protocol == "both" else (protocol,)
        self._output_dir = output_dir
        self._distributed = distributed
        self._records: list[Record] = []

    def reset(self) -> None:
        self._records = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for item, output in zip(inputs, outputs):
            for key in ("original_img_id", "sentence_id"):
                if key not in item:
                    raise KeyError(
                        f"Flickr evaluation needs {key!r} in the model input of image "
                        f"{item.get('image_id')}: is it a data set of the grounding form?"
                    )
            instances = output["instances"].to("cpu")
            # As arrays: lists of lists would take far more memory and time.
            boxes, scores = _split_by_phrase(
                instances.pred_boxes.tensor.detach().numpy(),
                instances.scores.detach().numpy(),
                instances.pred_classes.numpy(),
                _num_phrases(item["prompt"]),
            )
            self._records.append(
                {
                    "image_id": item["original_img_id"],
                    "sentence_id": item["sentence_id"],
                    "boxes": boxes,
                    "scores": scores,
                }
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        records = gather_records(self._records, distributed=self._distributed)
        if records is None:
            return {}
        if self._output_dir is not None:
            save_json(_as_saved(records), Path(self._output_dir) / "flickr_predictions.json")
        results = self.score(records)
        _log_table(results["grounding"])
        return results

    def score_file(self, path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
        """Results of saved predictions, a file as ``flickr_predictions.json``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is of another form or data set, or lacks sentences.
        """
        records = read_records(path, ("image_id", "sentence_id", "boxes"), ("scores",))
        ids = dict.fromkeys(image_key(record["image_id"]) for record in records)
        foreign = [key for key in ids if key not in self.images]
        if foreign:
            raise foreign_error(path, foreign, "the Entities files of the split")
        try:
            return self.score(records)
        except RuntimeError as error:
            raise ValueError(f"{path}: {error}") from error

    def score(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Results of saved predictions; see ``phrase_recall`` for their form."""
        results: dict[str, float] = OrderedDict()
        found = _recall_by_protocol(
            self.images, records, self._topk, self._iou_thresh, self._protocols
        )
        for protocol, recall in zip(self._protocols, found):
            prefix = "merged/" if len(self._protocols) > 1 and protocol == "merged" else ""
            for k, by_category in recall.items():
                name = prefix + ("upper_bound" if k == -1 else f"R@{k}")
                for category, value in by_category.items():
                    key = name if category == "all" else f"{name}_{category}"
                    results[key] = 100 * value
        return OrderedDict(grounding=results)


def _as_saved(records: Sequence[Record]) -> list[Record]:
    """Records in the form of ``flickr_predictions.json``."""
    saved = []
    for record in records:
        boxes, scores = _as_lists(record["boxes"], record["scores"])
        saved.append({**record, "boxes": boxes, "scores": scores})
    return saved


def _num_phrases(prompt: Prompt | Sequence[Prompt]) -> int:
    prompts = [prompt] if isinstance(prompt, Prompt) else prompt
    return sum(part.num_targets for part in prompts)


def _log_table(results: Mapping[str, float]) -> None:
    """Rows are R@k, columns the kinds of phrase."""
    rows: dict[str, dict[str, float]] = OrderedDict()
    for key, value in results.items():
        # "upper_bound" has an underscore of its own.
        name, _, category = key.replace("upper_bound", "upper bound").partition("_")
        rows.setdefault(name, OrderedDict())[category or "all"] = value
    table = tabulate(
        [OrderedDict({"recall in %": name}, **row) for name, row in rows.items()],
        headers="keys",
        floatfmt=".2f",
        tablefmt="pipe",
    )
    logger.info("Phrase grounding:\n%s", table)
