"""Exported models beside the predictor they were made of: size, time of an image, AP.

    python -m benchmarks export --weights output/quickstart/model_final.pth
                                [--config quickstart] [--images 100] [--threads 2]
                                [--json FILE] [--image-root DIR] [--out FILE]

Writes the model in each form, asks all of them for the classes of a COCO json in its first images,
taking turns, and compares what they find. Forms in float32 have to find what the predictor finds;
no result is written otherwise. Numbers of int8 differ, and the table says by how much.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import pairwise_iou
from machine import describe_machine, spread
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fiber_d2.export import ExportedPredictor, export
from fiber_d2.predictions import Prediction
from fiber_d2.predictor import Classes, Predictor

RESULT = Path(__file__).resolve().parent / "results" / "export.json"
FORMS: dict[str, dict[str, Any]] = {
    "onnx": {},
    "onnx, grid_sample": {"deform_conv": "grid_sample"},
    "onnx, int8": {"int8": True},
    "torch.export": {"format": "torch"},
}
INEXACT = "onnx, int8"
# Of the detections that are compared one by one; weaker ones are noise.
SCORE = 0.3


def write(form: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Export a form; what that took and gave."""
    start = time.perf_counter()
    export(args.config, args.weights, folder, **FORMS[form])
    return {
        "export_s": round(time.perf_counter() - start, 1),
        "megabytes": round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1),
    }


def precision(coco: COCO, images: Sequence[int], found: Sequence[Prediction]) -> dict[str, float]:
    """AP and AP50 in percent."""
    categories = sorted(coco.getCatIds())
    rows = [
        row
        for image, one in zip(images, found)
        for row in one.to_coco(image, category_ids=categories)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.params.imgIds = list(images)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"AP": round(100 * evaluation.stats[0], 2), "AP50": round(100 * evaluation.stats[1], 2)}


def agreement(expected: Sequence[Prediction], found: Sequence[Prediction]) -> dict[str, float]:
    """How many of the detections with a score above ``SCORE`` are there again, of the same class
    and with an overlap of at least 0.9, and how far their numbers are apart at most."""
    missing, total, scores, boxes = 0, 0, [0.0], [0.0]
    for one, other in zip(expected, found):
        one, other = one.instances, other.instances
        one = one[one.scores > SCORE]
        total += len(one)
        overlap = pairwise_iou(one.pred_boxes, other.pred_boxes)
        overlap[one.pred_classes[:, None] != other.pred_classes] = 0
        for row in range(len(one)):
            best = int(overlap[row].argmax()) if len(other) else 0
            if not len(other) or overlap[row, best] < 0.9:
                missing += 1
                continue
            scores.append(float((one.scores[row] - other.scores[best]).abs()))
            pair = one.pred_boxes.tensor[row] - other.pred_boxes.tensor[best]
            boxes.append(float(pair.abs().max()))
    return {
        "detections": total,
        "missing": missing,
        "largest_score_difference": float(f"{max(scores):.2g}"),
        "mean_score_difference": float(f"{np.mean(scores):.2g}"),
        "largest_box_difference_px": float(f"{max(boxes):.2g}"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default="datasets/shapes/annotations/instances_val.json")
    parser.add_argument("--image-root", type=Path, default=Path("datasets/shapes/images/val"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(args.json)
    images = sorted(coco.getImgIds())[: args.images]
    files = [args.image_root / coco.loadImgs(image)[0]["file_name"] for image in images]
    question = Classes([coco.cats[number]["name"] for number in sorted(coco.getCatIds())])
    predictor = Predictor(args.config, args.weights, device="cpu", batch_size=1)
    ways: dict[str, Any] = {"predictor": predictor}
    # Checkpoints may hold the state of an optimiser as well.
    size = sum(weight.nbytes for weight in predictor.model.state_dict().values())
    results: dict[str, dict[str, Any]] = {"predictor": {"megabytes": round(size / 1e6, 1)}}
    with tempfile.TemporaryDirectory() as place:
        for number, form in enumerate(FORMS):
            folder = Path(place) / str(number)
            results[form] = write(form, args, folder)
            ways[form] = ExportedPredictor(folder, threads=args.threads)
            print(form, results[form], flush=True)
        found: dict[str, list[Prediction]] = {name: [] for name in ways}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way(str(files[0]), question)
        for file in files:
            for name, way in ways.items():
                start = time.perf_counter()
                found[name].append(way(str(file), question))
                seconds[name].append(time.perf_counter() - start)
    for name, report in results.items():
        report["seconds"] = spread(seconds[name], 4)
        report.update(precision(coco, images, found[name]))
        if name != "predictor":
            report.update(agreement(found["predictor"], found[name]))
        print(name, report, flush=True)
    different = [name for name in FORMS if name != INEXACT and results[name]["missing"]]
    if different:
        print(f"error: not what the predictor finds: {', '.join(different)}", file=sys.stderr)
        return 1
    machine = describe_machine("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
    report = {
        "command": f"python -m benchmarks export --weights {args.weights} --config {args.config} "
        f"--images {args.images} --threads {args.threads}",
        "machine": {**machine, "threads": args.threads},
        "images": len(images),
        "classes": len(coco.cats),
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
