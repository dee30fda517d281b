"""Memory of loader workers that hold the records of a large data set.

    python benchmarks/lean_records.py [--records 600000] [--boxes 15] [--out FILE]

Makes a synthetic detection set (average ``--boxes`` per image, images of a few bytes) and measures
two ways to hold it, each with 2 workers of which each has read 20,000 records at random:

    serialized   a list in Detectron2's DatasetFromList(serialize=True): records in one array
    tsv          TSVRecords over .tsv files: row numbers only

Of every worker the unique (USS: private pages) and the proportional set size (PSS: shared pages
divided among those who share them) are read from /proc/self/smaps_rollup, so Linux only. A worker
without any data set is the baseline.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetFromList
from detectron2.structures import BoxMode
from machine import describe_machine
from torch.utils.data import DataLoader, Dataset

from fiber_d2.data.tsv import load_tsv_dataset, write_tsv

RESULT = Path(__file__).resolve().parent / "results" / "lean_records.json"
WORKERS = 2
TOUCHED = 20_000
CLASSES = 365
WIDTH, HEIGHT = 640, 480
METHODS = ("baseline", "serialized", "tsv")


def boxes_of(index: int, mean: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners with two decimals, as annotation files have them, and classes of an image."""
    generator = np.random.default_rng(index)
    count = generator.poisson(mean)
    low = generator.uniform(0, 400, (count, 2))
    corners = np.concatenate([low, low + generator.uniform(5, 80, (count, 2))], axis=1)
    return corners.round(2), generator.integers(0, CLASSES, count)


def make_records(count: int, mean: int) -> list[dict[str, Any]]:
    records = []
    for index in range(count):
        boxes, classes = boxes_of(index, mean)
        records.append(
            {
                "file_name": f"datasets/objects365/images/train/{index:012d}.jpg",
                "height": HEIGHT,
                "width": WIDTH,
                "image_id": index,
                "annotations": [
                    {"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": c, "iscrowd": 0}
                    for b, c in zip(boxes.tolist(), classes.tolist())
                ],
            }
        )
    return records


def write_files(folder: Path, count: int, mean: int) -> None:
    def labels() -> Iterator[list[str]]:
        for index in range(count):
            boxes, classes = boxes_of(index, mean)
            objects = [
                {"class": f"class {c}", "rect": b} for b, c in zip(boxes.tolist(), classes.tolist())
            ]
            yield [str(index), json.dumps(objects)]

    size = json.dumps([{"height": HEIGHT, "width": WIDTH}])
    write_tsv(labels(), str(folder / "train.label.tsv"))
    write_tsv(([str(index), size] for index in range(count)), str(folder / "train.hw.tsv"))
    write_tsv(([str(index), "QUJD"] for index in range(count)), str(folder / "train.img.tsv"))
    names = {f"class {index}": index + 1 for index in range(CLASSES)}
    (folder / "labelmap.json").write_text(json.dumps(names))
    (folder / "train.yaml").write_text(
        "img: train.img.tsv\nlabel: train.label.tsv\nhw: train.hw.tsv\nlabelmap: labelmap.json\n"
    )


class Probe(Dataset):
    """Item ``k`` reads a share of the records and tells the memory of the process that did."""

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return WORKERS

    def __getitem__(self, item: int) -> dict[str, float]:
        start = time.perf_counter()
        touched = min(TOUCHED, len(self.records))
        chosen = np.random.default_rng(item).choice(len(self.records), touched, replace=False)
        for index in chosen.tolist():
            self.records[index]
        seconds = time.perf_counter() - start
        return {"records": touched, "seconds": seconds, **memory()}


def memory() -> dict[str, float]:
    """MiB of this process."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0]) / 1024
    return {
        "uss_mib": fields["Private_Clean"] + fields["Private_Dirty"],
        "pss_mib": fields["Pss"],
    }


def measure(method: str, folder: Path, count: int, mean: int) -> dict[str, Any]:
    start = time.perf_counter()
    if method == "serialized":
        records: Sequence[Any] = DatasetFromList(make_records(count, mean), copy=False)
    elif method == "tsv":
        records = load_tsv_dataset(str(folder / "train.yaml"))
    else:
        records = ()
    seconds = time.perf_counter() - start
    loader = DataLoader(Probe(records), batch_size=None, num_workers=WORKERS)
    workers = [{key: round(value, 2) for key, value in w.items()} for w in loader]
    return {
        "ready_after_s": round(seconds, 1),
        "workers": workers,
        "main_process": {key: round(value, 1) for key, value in memory().items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=600_000)
    parser.add_argument("--boxes", type=int, default=15, help="average per image")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.method is not None:
        print(json.dumps(measure(args.method, args.folder, args.records, args.boxes)))
        return 0
    report: dict[str, Any] = {
        "command": "python benchmarks/lean_records.py "
        f"--records {args.records} --boxes {args.boxes}",
        "machine": describe_machine("torch", "numpy"),
        "records": args.records,
        "mean_boxes": args.boxes,
        "results": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), args.records, args.boxes)
        for method in METHODS:
            # A process each, so that none inherits what another left in memory.
            options = [f"--method={method}", f"--folder={folder}"]
            sizes = [f"--records={args.records}", f"--boxes={args.boxes}"]
            command = [sys.executable, "-W", "ignore", __file__, *sizes, *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            report["results"][method] = json.loads(done.stdout.splitlines()[-1])
            print(method, json.dumps(report["results"][method]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
