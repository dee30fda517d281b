"""Chance level: the score of someone who knows where all objects are, but reads no word.

Boxes are the ground truth's own; which word each is tied to is drawn at random. A model that
scores above this has learnt to tie words to boxes, not only to find boxes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from detectron2.evaluation import DatasetEvaluator

from fiber_d2.evaluation.build import build_evaluator
from fiber_d2.evaluation.coco import GroundedCOCOEvaluator
from fiber_d2.evaluation.entities import all_boxes
from fiber_d2.evaluation.flickr import FlickrRecallEvaluator
from fiber_d2.evaluation.records import Record
from fiber_d2.evaluation.refexp import RefExpEvaluator

# numpy's seed 0 and [0, 0] give the same numbers. Data generated from small seeds must not be
# guessed with the very numbers that made it, so guesses draw from a stream of their own.
_STREAM = 0x67756573


def chance_level(dataset_name: str, seed: int = 0, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Mean results over ``repeats`` random answers; same keys as the data set's evaluator.

    - detection: every (non-crowd) ground-truth box gets a random class and a random score;
    - phrases: all annotated boxes of the image, in random order for every phrase;
    - referring expressions: the ``candidates`` of the expression in random order.

    Needs no other process: call it on one.

    Args:
        dataset_name: registered data set.
        seed: of the random answers; repeat ``i`` does not depend on ``repeats``.
        repeats: random answers to average over.

    Raises:
        ValueError: where ``repeats`` is below 1, or expressions do not name their candidates.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    evaluator = build_evaluator(dataset_name)
    guess = next((draw for kind, draw in GUESSES.items() if isinstance(evaluator, kind)), None)
    if guess is None:
        raise ValueError(f"No chance level is defined for {type(evaluator).__name__}.")
    rounds = [
        evaluator.score(guess(evaluator, np.random.default_rng([_STREAM, seed, index])))
        for index in range(repeats)
    ]
    return OrderedDict(
        (
            task,
            OrderedDict((key, float(np.mean([r[task][key] for r in rounds]))) for key in results),
        )
        for task, results in rounds[0].items()
    )


def _guess_classes(
    evaluator: GroundedCOCOEvaluator, generator: np.random.Generator
) -> list[Record]:
    boxes = [a for a in evaluator.ground_truth if not a.get("iscrowd", 0)]
    classes = generator.choice(evaluator.category_ids, size=len(boxes))
    scores = generator.random(len(boxes))
    return [
        {
            "image_id": box["image_id"],
            "bbox": list(box["bbox"]),
            "category_id": int(category_id),
            "score": float(score),
        }
        for box, category_id, score in zip(boxes, classes, scores)
    ]


def _guess_phrases(
    evaluator: FlickrRecallEvaluator, generator: np.random.Generator
) -> list[Record]:
    records = []
    for key, image in evaluator.images.items():
        boxes = all_boxes(image)
        records += [
            {
                "image_id": key,
                "sentence_id": sentence,
                "boxes": [generator.permutation(boxes) for _ in image.evaluable(sentence)],
            }
            for sentence in range(len(image.sentences))
            if image.evaluable(sentence)
        ]
    return records


def _guess_expressions(evaluator: RefExpEvaluator, generator: np.random.Generator) -> list[Record]:
    expressions = evaluator.expressions
    records = []
    for image_id, candidates in zip(expressions.ids, expressions.candidates):
        if candidates is None:
            raise ValueError(
                f"{evaluator.json_file}: expression {image_id} has no 'candidates' (XYWH boxes of "
                "the objects it chooses among), so the level of chance cannot be known."
            )
        scores = generator.random(len(candidates))
        records.append({"image_id": image_id, "boxes": candidates, "scores": scores})
    return records


GUESSES: dict[type[DatasetEvaluator], Callable[..., list[Record]]] = {
    GroundedCOCOEvaluator: _guess_classes,
    FlickrRecallEvaluator: _guess_phrases,
    RefExpEvaluator: _guess_expressions,
}
