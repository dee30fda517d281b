"""How many training images one processor core can prepare in a second.

    python benchmarks/data_loading.py [--images 200] [--out FILE]

Makes JPEG files like photographs (1/f noise, about 150 kB at 640x480, as COCO's are on average)
with 7 boxes of COCO's 80 classes each, and reads them with the loader of the recipes: decoding, a
random flip, the shorter side to 800 pixels with the longer one at most 1333, caption and positive
map. In one process without loading workers, by processor time, so that other programs do not count:

    whole      all of it, from .jpg files and from a .tsv file of the same images
    stages     the parts by themselves

for captions that name the 80 classes in one order, in a new order for each image, and for captions
of classes sampled for each image; and for images of twice the side, which are read and scaled down.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from machine import describe_machine
from PIL import Image

from fiber_d2.data import ResizeShortestEdgeTruncated, build_train_loader, register_coco_json
from fiber_d2.data.captions import DetectionPrompter, SampledDetectionPrompter
from fiber_d2.data.images import read_image
from fiber_d2.data.tsv import load_tsv_dataset, write_tsv
from fiber_d2.text import load_tokenizer

RESULT = Path(__file__).resolve().parent / "results" / "data_loading.json"
CLASSES = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]
SIZES = {"640x480": (640, 480), "1280x960": (1280, 960)}
BOXES = 7
# Of the pixels; it decides how large the files are.
NOISE = 8.0
# The bundled tokenizer splits these names into more pieces than RoBERTa's.
TOKENS = 512
AUGMENTATIONS = (
    T.RandomFlip(),
    ResizeShortestEdgeTruncated(short_edge_length=800, max_size=1333),
)
CAPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "shuffled": {"shuffle_classes": True},
    "sampled": {"sampled_classes": {"max_total": 40}},
}
REPEATS = 3


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency, as that of photographs does."""
    pixels = np.zeros((height, width, 3), np.float32)
    for side in (4, 8, 16, 32, 64, 128, 256):
        coarse = rng.normal(0, 1, (side * height // width + 1, side, 3)).astype(np.float32)
        layers = [
            np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.BICUBIC))
            for c in range(3)
        ]
        pixels += np.stack(layers, axis=2) * (160 / side**0.65)
    pixels += rng.normal(0, NOISE, (height, width, 3)).astype(np.float32)  # of a sensor
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))


def write_data(folder: Path, count: int, size: tuple[int, int]) -> int:
    """``truth.json`` with images, and the same as TSV files; the mean size of an image, bytes."""
    rng = np.random.default_rng(0)
    width, height = size
    images, annotations, rows = [], [], {"img": [], "label": [], "hw": []}
    total = 0
    for index in range(count):
        name = f"{index:012d}.jpg"
        buffer = io.BytesIO()
        photograph(rng, width, height).save(buffer, "JPEG", quality=95)
        (folder / name).write_bytes(buffer.getvalue())
        total += len(buffer.getvalue())
        low = rng.uniform(0, [width * 0.6, height * 0.6], (BOXES, 2))
        sides = rng.uniform(10, 0.4 * height, (BOXES, 2))
        classes = rng.integers(0, len(CLASSES), BOXES)
        images.append({"id": index, "file_name": name, "width": width, "height": height})
        for (x, y), (w, h), number in zip(low.tolist(), sides.tolist(), classes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": number + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        objects = [
            {"class": CLASSES[c], "rect": [x, y, x + w - 1, y + h - 1]}
            for (x, y), (w, h), c in zip(low.tolist(), sides.tolist(), classes.tolist())
        ]
        rows["img"].append([str(index), base64.b64encode(buffer.getvalue()).decode()])
        rows["label"].append([str(index), json.dumps(objects)])
        rows["hw"].append([str(index), json.dumps([{"height": height, "width": width}])])
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    for name, content in rows.items():
        write_tsv(content, str(folder / f"{name}.tsv"))
    numbers = {name: i + 1 for i, name in enumerate(CLASSES)}
    (folder / "labelmap.json").write_text(json.dumps(numbers))
    (folder / "data.yaml").write_text(
        "img: img.tsv\nlabel: label.tsv\nhw: hw.tsv\nlabelmap: labelmap.json\n"
    )
    return total // count


def seconds_of(work: Callable[[], Any], images: int) -> float:
    """Processor seconds per image, the median of some times."""
    work()  # files come into the system's cache, tables are built
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append((time.process_time() - start) / images)
    return statistics.median(times)


def measure_loader(name: str, count: int, options: dict[str, Any]) -> float:
    loader = build_train_loader(
        datasets=[name],
        tokenizer="shapes",
        augmentations=AUGMENTATIONS,
        total_batch_size=4,
        num_workers=0,
        max_tokens=TOKENS,
        **options,
    )
    batches = iter(loader)
    return seconds_of(lambda: list(islice(batches, count // 4)), count // 4 * 4)


def measure_stages(name: str) -> dict[str, float]:
    records = DatasetCatalog.get(name)
    augmentations = T.AugmentationList(list(AUGMENTATIONS))
    images = [read_image(record, "BGR") for record in records[:20]]
    tokenizer = load_tokenizer("shapes")
    prompters = {
        "caption_fixed": DetectionPrompter(tokenizer, CLASSES, max_tokens=TOKENS),
        "caption_shuffled": DetectionPrompter(tokenizer, CLASSES, max_tokens=TOKENS, shuffle=True),
        "caption_sampled": SampledDetectionPrompter(
            tokenizer, CLASSES, max_tokens=TOKENS, **CAPTIONS["sampled"]["sampled_classes"]
        ),
    }
    found = {
        "read_and_decode": seconds_of(
            lambda: [read_image(record, "BGR") for record in records], len(records)
        ),
        "flip_and_resize": seconds_of(
            lambda: [augmentations(T.AugInput(image)) for image in images], len(images)
        ),
    }
    for stage, prompter in prompters.items():
        found[stage] = seconds_of(
            lambda prompter=prompter: [prompter.for_training(record) for record in records],
            len(records),
        )
    return found


def measure(size: str, count: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bytes_per_image = write_data(folder, count, SIZES[size])
        register_coco_json("benchmark_files", str(folder / "truth.json"), str(folder))
        DatasetCatalog.register(
            "benchmark_tsv",
            lambda: load_tsv_dataset(str(folder / "data.yaml"), "benchmark_tsv"),
        )
        MetadataCatalog.get("benchmark_tsv").set(evaluator_type="coco")
        whole = {
            f"files, {caption} caption": measure_loader("benchmark_files", count, options)
            for caption, options in CAPTIONS.items()
        }
        whole["tsv, fixed caption"] = measure_loader("benchmark_tsv", count, {})
        stages = measure_stages("benchmark_files")
    return {
        "kilobytes_per_image": round(bytes_per_image / 1000, 1),
        "images_per_second": {name: round(1 / seconds, 1) for name, seconds in whole.items()},
        "milliseconds": {name: round(1000 * seconds, 2) for name, seconds in stages.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.size is not None:
        print(json.dumps(measure(args.size, args.images)))
        return 0
    results = {}
    for size in SIZES:
        command = [sys.executable, "-W", "ignore", __file__, f"--images={args.images}"]
        done = subprocess.run(
            [*command, f"--size={size}"], stdout=subprocess.PIPE, text=True, check=True
        )
        results[size] = json.loads(done.stdout.splitlines()[-1])
        print(size, json.dumps(results[size]), flush=True)
    report = {
        "command": f"python benchmarks/data_loading.py --images {args.images}",
        "machine": describe_machine("torch", "torchvision", "pillow", "detectron2"),
        "per": "processor core",
        "augmented_to": "800 pixels, at most 1333",
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
