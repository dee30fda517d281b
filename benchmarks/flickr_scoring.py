"""Time to score Flickr30k phrase grounding: this project against the definition, word for word.

    python benchmarks/flickr_scoring.py [--sentences 5000] [--detections 100] [--out FILE]

Makes the files of Flickr30k Entities for synthetic images of five sentences each, with three or
four phrases per sentence and one to four true boxes per phrase, and detections, of which a third
lie near a true box of their phrase. From the same detections both compute R@1/5/10 and the upper
bound over all phrases and per type, AnyBox and MergedBox:

    definition  sentence by sentence, phrase by phrase, and k by k the overlaps of the first k
                boxes with the true ones
    ours        fiber_d2.evaluation.FlickrRecallEvaluator, from detections to results

Before anything is timed the results of both must be equal to the last bit. Both then run in turns;
times are of the processor, which other programs do not take part in. Reading the ground truth is
timed apart, and is no part of the comparison.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from machine import describe_machine, spread

from fiber_d2.evaluation import FlickrRecallEvaluator
from fiber_d2.structures import Prompt

RESULT = Path(__file__).resolve().parent / "results" / "flickr_scoring.json"
PER_IMAGE = 5
SIZE = 500.0
TOPK = (1, 5, 10, -1)
TYPES = ("people", "clothing", "bodyparts", "animals", "vehicles", "instruments", "scene", "other")


class Sentence(NamedTuple):
    """A sentence with what was detected for it.

    Attributes:
        image, number: of the sentence; phrases: entity of each; boxes ``(N, 4)`` XYXY, scores
        ``(N,)`` and labels ``(N,)``, the index of the phrase.
    """

    image: int
    number: int
    phrases: list[int]
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class Entity(NamedTuple):
    type: str
    boxes: np.ndarray


def make_data(count: int, detections: int, seed: int = 0) -> tuple[list[Entity], list[Sentence]]:
    rng = np.random.default_rng(seed)
    entities: list[Entity] = []
    sentences: list[Sentence] = []
    for image in range(-(-count // PER_IMAGE)):
        first = len(entities)
        for _ in range(rng.integers(4, 9)):
            boxes = random_boxes(rng, rng.choice([1, 2, 3, 4], p=[0.7, 0.15, 0.1, 0.05])).round()
            entities.append(Entity(str(rng.choice(TYPES)), boxes))
        for number in range(min(PER_IMAGE, count - len(sentences))):
            phrases = rng.integers(first, len(entities), rng.integers(3, 5)).tolist()
            labels = rng.integers(0, len(phrases), detections)
            boxes = random_boxes(rng, detections)
            for row in range(detections // 3):
                true = entities[phrases[labels[row]]].boxes
                box = true[rng.integers(len(true))]
                boxes[row] = box + rng.normal(0, 0.12, 4) * np.tile(box[2:] - box[:2], 2)
            # Scores of three decimals: equal ones occur.
            scores = np.concatenate(
                [rng.beta(2, 3, detections // 3), rng.beta(1, 5, detections - detections // 3)]
            ).round(3)
            found = (boxes.astype(np.float32), scores.astype(np.float32), labels)
            sentences.append(Sentence(image, number, phrases, *found))
    return entities, sentences


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    size = rng.uniform(20, 300, (count, 2))
    low = rng.uniform(0, 1, (count, 2)) * (SIZE - size)
    return np.concatenate([low, low + size], axis=1)


def write_entities(root: Path, entities: list[Entity], sentences: list[Sentence]) -> None:
    """The data set's own files."""
    (root / "Annotations").mkdir()
    (root / "Sentences").mkdir()
    lines: dict[int, list[str]] = {}
    used: dict[int, set[int]] = {}
    for sentence in sentences:
        words = [f"[/EN#{e}/{entities[e].type} thing {e}]" for e in sentence.phrases]
        lines.setdefault(sentence.image, []).append(" beside ".join(words) + " .")
        used.setdefault(sentence.image, set()).update(sentence.phrases)
    for image, text in lines.items():
        objects = []
        for entity in sorted(used[image]):
            for box in entities[entity].boxes:
                corners = zip(("xmin", "ymin", "xmax", "ymax"), box.astype(int).tolist())
                inside = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
                objects.append(f"<object><name>{entity}</name><bndbox>{inside}</bndbox></object>")
        (root / "Annotations" / f"{image}.xml").write_text(
            f"<annotation>{''.join(objects)}</annotation>"
        )
        (root / "Sentences" / f"{image}.txt").write_text("\n".join(text) + "\n")
    (root / "bench.txt").write_text("\n".join(str(image) for image in lines) + "\n")


def by_definition(entities: list[Entity], sentences: list[Sentence]) -> dict[str, float]:
    """Recall in percent, nothing computed but what the definition says, in its order."""
    results = {}
    for prefix in ("", "merged/"):
        hits: dict[tuple[int, str], int] = {}
        totals: dict[tuple[int, str], int] = {}
        for sentence in sentences:
            ranking = sorted(range(len(sentence.scores)), key=lambda i: -sentence.scores[i])
            for place, name in enumerate(sentence.phrases):
                entity = entities[name]
                found = [sentence.boxes[i] for i in ranking if sentence.labels[i] == place]
                found.append(np.zeros(4, dtype=np.float32))
                true = entity.boxes
                if prefix:
                    true = np.concatenate([true[:, :2].min(0), true[:, 2:].max(0)])[None]
                for k in TOPK:
                    looked_at = np.asarray(found if k == -1 else found[:k], dtype=np.float64)
                    hit = overlaps(looked_at, true).max() >= 0.5
                    for category in ("all", entity.type):
                        key = (k, category)
                        hits[key] = hits.get(key, 0) + int(hit)
                        totals[key] = totals.get(key, 0) + 1
        for (k, category), total in totals.items():
            name = prefix + ("upper_bound" if k == -1 else f"R@{k}")
            key = name if category == "all" else f"{name}_{category}"
            results[key] = 100 * (hits[k, category] / total)
    return results


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of each of ``(N, 4)`` with each of ``(M, 4)``, continuous coordinates."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inside = (high - low).clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    return inside / (areas[0][:, None] + areas[1][None] - inside)


def model_outputs(sentences: list[Sentence]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What a loader and a model give an evaluator."""
    pairs = []
    for sentence in sentences:
        number = len(sentence.phrases)
        prompt = Prompt(
            text="",
            input_ids=torch.zeros(number, dtype=torch.int64),
            attention_mask=torch.ones(number, dtype=torch.bool),
            positive_map=torch.eye(number),
            target_ids=torch.arange(number),
        )
        item = {
            "image_id": len(pairs),
            "original_img_id": sentence.image,
            "sentence_id": sentence.number,
            "prompt": prompt,
        }
        instances = Instances((int(SIZE), int(SIZE)))
        instances.pred_boxes = Boxes(torch.from_numpy(sentence.boxes))
        instances.scores = torch.from_numpy(sentence.scores)
        instances.pred_classes = torch.from_numpy(sentence.labels)
        pairs.append((item, {"instances": instances}))
    return pairs


def by_evaluator(
    evaluator: FlickrRecallEvaluator, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, float]:
    evaluator.reset()
    for item, output in pairs:
        evaluator.process([item], [output])
    return dict(evaluator.evaluate()["grounding"])


def cpu_seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="per sentence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    entities, sentences = make_data(args.sentences, args.detections)
    with tempfile.TemporaryDirectory() as folder:
        write_entities(Path(folder), entities, sentences)
        reading = cpu_seconds(
            lambda: FlickrRecallEvaluator(entities_root=folder, split="bench", protocol="both")
        )
        evaluator = FlickrRecallEvaluator(entities_root=folder, split="bench", protocol="both")
    pairs = model_outputs(sentences)
    ways = {
        "definition": lambda: by_definition(entities, sentences),
        "ours": lambda: by_evaluator(evaluator, pairs),
    }
    expected, found = ways["definition"](), ways["ours"]()
    if found != expected:
        unequal = [
            key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)
        ]
        print(f"error: the two differ in {', '.join(sorted(unequal))}", file=sys.stderr)
        return 1
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            seconds[name].append(cpu_seconds(way))
        print({name: round(values[-1], 3) for name, values in seconds.items()}, flush=True)
    ratios = [slow / fast for slow, fast in zip(seconds["definition"], seconds["ours"])]
    report = {
        "command": f"python benchmarks/flickr_scoring.py --sentences {args.sentences} "
        f"--detections {args.detections} --repeats {args.repeats}",
        "machine": describe_machine("numpy", "torch"),
        "sentences": len(sentences),
        "phrases": sum(len(sentence.phrases) for sentence in sentences),
        "true_boxes_per_phrase": round(
            float(np.mean([len(entities[e].boxes) for s in sentences for e in s.phrases])), 2
        ),
        "detections": sum(len(sentence.scores) for sentence in sentences),
        "numbers_compared": len(expected),
        "R@1_of_both": expected["R@1"],
        "reading_ground_truth_cpu_seconds": round(reading, 2),
        "cpu_seconds": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast": spread(ratios, 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
