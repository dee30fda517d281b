"""Time to score LVIS detections: this project against the ``lvis`` package, on the same data.

    python benchmarks/lvis_scoring.py [--images 5000] [--detections 300] [--out FILE]

Makes synthetic ground truth in the proportions of LVIS (1,203 classes of very different frequency,
about 12 objects of 3 to 4 classes in an image, some 6 classes known to be absent) and detections,
of which a third lie near an object. Both score the same lists of result dicts:

    lvis           the package, with its limit of 300 detections per image (ordinary AP)
    ours           fiber_d2.evaluation.score_lvis: that AP and FixedAP

Each runs in a process of its own; the ordinary AP of both must agree. The package looks at every
image for every class and area range, whatever they hold: 5,000 images take it some minutes and
several GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

RESULT = Path(__file__).resolve().parent / "results" / "lvis_scoring.json"
CLASSES = 1203
SIZE = 640.0
METHODS = ("lvis", "ours")
TOLERANCE = 1e-9


def make_data(
    num_images: int, per_image: int, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, CLASSES + 1)
    weights = rng.permutation(weights / weights.sum())
    images, annotations, detections = [], [], []
    for image_id in range(1, num_images + 1):
        present = np.unique(rng.choice(CLASSES, 1 + rng.poisson(3), p=weights)) + 1
        others = np.setdiff1d(np.arange(1, CLASSES + 1), present)
        images.append(
            {
                "id": image_id,
                "neg_category_ids": rng.choice(others, 6, replace=False).tolist(),
                "not_exhaustive_category_ids": present[rng.random(len(present)) < 0.15].tolist(),
            }
        )
        classes = np.repeat(present, 1 + rng.poisson(2.5, len(present)))
        boxes = random_boxes(rng, len(classes))
        for category, box in zip(classes.tolist(), boxes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": 0.7 * box[2] * box[3],
                }
            )
        near = rng.integers(0, len(classes), per_image // 3)
        noisy = boxes[near] + rng.normal(0, 0.1, (len(near), 4)) * boxes[near][:, [2, 3, 2, 3]]
        noisy[:, 2:] = noisy[:, 2:].clip(min=1.0)
        far = per_image - len(near)
        # Wrong guesses, too, are about classes that are likely in general.
        guesses = rng.choice(CLASSES, far, p=weights) + 1
        found = np.concatenate([noisy, random_boxes(rng, far)]).astype(np.float32)
        scores = np.concatenate([rng.beta(2, 3, len(near)), rng.beta(1, 6, far)])
        for category, box, score in zip(
            np.concatenate([classes[near], guesses]).tolist(),
            found.tolist(),
            scores.astype(np.float32).tolist(),
        ):
            detections.append(
                {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            )
    order = np.argsort(weights)
    frequency = np.empty(CLASSES, dtype="<U1")
    # Shares of the three groups of classes in LVIS v1: 337, 461 and 405.
    frequency[order[:337]], frequency[order[337:798]], frequency[order[798:]] = "r", "c", "f"
    categories = [{"id": i + 1, "frequency": f} for i, f in enumerate(frequency.tolist())]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """float64 ``(count, 4)``, XYWH within the image; small ones are many."""
    size = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    return np.concatenate([rng.uniform(0, SIZE - size), size], axis=1)


def score_ours(truth: str, detections: list[dict[str, Any]]) -> dict[str, float]:
    from fiber_d2.evaluation import score_lvis

    results = score_lvis(truth, detections)["bbox_per_image"]
    return {key: float(np.nan_to_num(value, nan=-1)) for key, value in results.items()}


def score_package(truth: str, detections: list[dict[str, Any]]) -> dict[str, float]:
    # The package uses an alias that numpy dropped in 1.24.
    np.float = float
    from lvis import LVIS, LVISEval, LVISResults

    ground_truth = LVIS(truth)
    evaluation = LVISEval(ground_truth, LVISResults(ground_truth, detections), "bbox")
    evaluation.run()
    return {key.split("@")[0]: float(value) for key, value in evaluation.get_results().items()}


def measure(method: str, folder: Path) -> dict[str, Any]:
    """Time, memory and results of one way of scoring.

    Reading the detections takes no part in the time, but in the memory; programs in neither.
    """
    score = {"lvis": score_package, "ours": score_ours}[method]
    score(*read(folder / "small"))  # imports take seconds of their own
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    truth, detections = read(folder)
    start, cpu_start = time.perf_counter(), time.process_time()
    results = score(truth, detections)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory_mib": (peak - before) / 1024,
        "results": results,
    }


def read(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    return str(folder / "truth.json"), json.loads((folder / "detections.json").read_text())


def write(folder: Path, truth: dict[str, Any], detections: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "detections.json").write_text(json.dumps(detections))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=300, help="per image")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.method is not None:
        print(json.dumps(measure(args.method, args.folder)))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        truth, detections = make_data(args.images, args.detections)
        write(Path(folder), truth, detections)
        sizes = {"objects": len(truth["annotations"]), "detections": len(detections)}
        del truth, detections  # gigabytes that the two may need
        write(Path(folder, "small"), *make_data(2, 30))
        for method in METHODS:
            command = [sys.executable, "-W", "ignore", __file__]
            options = [f"--method={method}", f"--folder={folder}"]
            done = subprocess.run(
                [*command, *options], stdout=subprocess.PIPE, text=True, check=True
            )
            found[method] = json.loads(done.stdout.splitlines()[-1])
            print(method, json.dumps(found[method]), flush=True)
    results = [found[method].pop("results") for method in METHODS]
    difference = max(abs(results[0][name] - results[1][name]) for name in results[0])
    if not difference <= TOLERANCE:
        print(f"error: the two differ by {difference}", file=sys.stderr)
        return 1
    report = {
        "command": "python benchmarks/lvis_scoring.py "
        f"--images {args.images} --detections {args.detections}",
        "machine": describe_machine("numpy"),
        "images": args.images,
        "classes": CLASSES,
        **sizes,
        "AP_of_both": results[0]["AP"],
        "largest_difference": difference,
        "results": {
            method: {key: round(value, 2) for key, value in found[method].items()}
            for method in METHODS
        },
        # Of the processor's time, which other programs do not take part in.
        "times_as_fast": round(found["lvis"]["cpu_seconds"] / found["ours"]["cpu_seconds"], 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
