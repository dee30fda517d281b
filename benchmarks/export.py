"""Exported models beside the predictor they were made of: size, processor time of an image, AP.

    python -m benchmarks export FOLDER [FOLDER ...] --weights output/quickstart/model_final.pth
                                [--config quickstart] [--images 100]
                                [--json FILE] [--image-root DIR] [--out FILE]

The folders are those that `fiber-d2 export` wrote of these weights. All are asked, by one thread,
for the classes of a COCO json in its first images, taking turns, and what they find is compared.
Models in float32 have to find what the predictor finds; no result is written otherwise. Those in
int8 find something else, and the table says how much.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
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

from fiber_d2.export import ExportedModel, ExportedPredictor
from fiber_d2.predictions import Prediction
from fiber_d2.predictor import Classes, Predictor

RESULT = Path(__file__).resolve().parent / "results" / "export.json"
# Of the detections that are compared one by one; weaker ones are noise.
SCORE = 0.3


def name_of(model: ExportedModel) -> str:
    """What kind of export it is."""
    known = model.known
    words = [known["format"], "whole" if len(known["graphs"]) == 1 else "parts"]
    words += ["grid_sample"] * (known["deform_conv"] != "operator")
    return ", ".join([*words, *(["int8"] if known.get("int8") else [])])


def megabytes(folder: Path, model: ExportedModel) -> float:
    """Of the model's files; others may lie beside them."""
    names = [graph["file"] for graph in model.known["graphs"].values()]
    sizes = [path.stat().st_size for name in names for path in folder.glob(f"{name}*")]
    return round(sum(sizes) / 1e6, 1)


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
    return {
        name: round(100 * float(evaluation.stats[i]), 2) for i, name in enumerate(("AP", "AP50"))
    }


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
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--json", default="datasets/shapes/annotations/instances_val.json")
    parser.add_argument("--image-root", type=Path, default=Path("datasets/shapes/images/val"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
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
    for folder in args.folders:
        exported = ExportedPredictor(folder, threads=1)
        name = name_of(exported.model)
        ways[name] = exported
        results[name] = {"megabytes": megabytes(folder, exported.model)}
    found: dict[str, list[Prediction]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(str(files[0]), question)
    for file in files:
        for name, way in ways.items():
            start = time.process_time()
            found[name].append(way(str(file), question))
            cpu_seconds[name].append(time.process_time() - start)
    for name, report in results.items():
        report["cpu_seconds"] = spread(cpu_seconds[name], 4)
        report.update(precision(coco, images, found[name]))
        if name != "predictor":
            report.update(agreement(found["predictor"], found[name]))
        print(name, report, flush=True)
    different = [n for n, r in results.items() if "int8" not in n and r.get("missing")]
    if different:
        print(f"error: not what the predictor finds: {', '.join(different)}", file=sys.stderr)
        return 1
    machine = describe_machine("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")
    report = {
        "command": f"python -m benchmarks export {' '.join(map(str, args.folders))} "
        f"--weights {args.weights} --config {args.config} "
        f"--images {args.images}",
        "machine": {**machine, "threads": 1},
        "images": len(images),
        "classes": len(coco.cats),
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
