"""Seconds until a program is of use: imports, help texts, a model built, one picture predicted.

    python -m benchmarks start_up [--repeats 5] [--full] [--out FILE]

Each is a process of its own, whose wall-clock and processor times are taken after one run that
warms the disk's cache; torch by itself stands beside them, since nothing here starts without it.
`--full` adds FIBER-B, with random weights on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine, spread
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).resolve().parent / "results" / "start_up.json"

BUILD = """
import sys, torch
from detectron2.config import LazyConfig, instantiate
model = instantiate(LazyConfig.load(sys.argv[1]).model).eval()
torch.save({"model": model.state_dict()}, sys.argv[2]) if sys.argv[2:] else None
"""
SMALL, FULL = (f"configs/common/models/{name}.py" for name in ("fiber_tiny", "fiber_b"))


def programs(folder: Path, full: bool) -> dict[str, list[str]]:
    """Name and arguments of Python of what is timed; writes what they read."""
    picture, weights = str(folder / "picture.png"), str(folder / "model.pth")
    Image.new("RGB", (192, 128), (120, 130, 140)).save(picture)
    # The recipe decides the shapes of the weights.
    run(["-c", BUILD, "configs/quickstart.py", weights], folder)
    predict = ["predict", picture, "--classes", "red circle", "--config", "quickstart"]
    found = {
        "import torch": ["-c", "import torch"],
        "import fiber_d2": ["-c", "import fiber_d2"],
        "import fiber_d2.modeling": ["-c", "import fiber_d2.modeling"],
        "fiber-d2 --help": ["-m", "fiber_d2", "--help"],
        "train_net.py --help": ["train_net.py", "--help"],
        "quickstart's model built": ["-c", BUILD, SMALL],
        "fiber-d2 predict, one picture": [
            *("-m", "fiber_d2", *predict),
            *("--weights", weights, "--output", str(folder / "predicted")),
        ],
    }
    return {**found, "FIBER-B built": ["-c", BUILD, FULL]} if full else found


def run(arguments: Sequence[str], folder: Path) -> tuple[float, float]:
    """Wall-clock and processor seconds of ``python ARGUMENTS``, which must succeed."""
    with open(folder / "output", "w+", encoding="utf-8") as output:
        start, before = time.perf_counter(), os.times()
        code = subprocess.call([sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=output)
        wall, after = time.perf_counter() - start, os.times()
        if code:
            output.seek(0)
            raise SystemExit(f"error: {' '.join(arguments)!r} failed:\n{output.read()[-2000:]}")
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="FIBER-B, too")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        timed = programs(folder, args.full)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
        for repeat in range(-1, args.repeats):
            for name, arguments in timed.items():
                found = run(arguments, folder)
                if repeat >= 0:
                    times[name].append(found)
    results: dict[str, Any] = {
        name: {
            "seconds": spread([wall for wall, _ in found]),
            "cpu_seconds": spread([used for _, used in found]),
        }
        for name, found in times.items()
    }
    options = f" --repeats {args.repeats}" + (" --full" if args.full else "")
    report = {
        "command": f"python -m benchmarks start_up{options}",
        "machine": describe_machine("torch", "transformers", "detectron2"),
        "results": results,
    }
    for name, found in results.items():
        print(f"{name:<30}{found['seconds']['median']:8.2f} s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
