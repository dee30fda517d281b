"""Versions, devices and operators: the first thing to paste into a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import fiber_d2
from fiber_d2.layers.__main__ import describe
from fiber_d2.predictor_settings import shipped_configs

# Distribution names.
_LIBRARIES = (
    "torch torchvision detectron2 numpy transformers tokenizers timm fvcore iopath omegaconf "
    "hydra-core pycocotools opencv-python-headless opencv-python Pillow lvis faster-coco-eval "
    "supervision"
).split()


def gather() -> dict[str, Any]:
    """All of it, in plain values."""
    libraries: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            libraries[name] = None
    gpus = [
        {
            "name": torch.cuda.get_device_name(index),
            "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
        }
        for index in range(torch.cuda.device_count())
    ]
    return {
        "fiber_d2": fiber_d2.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
        "libraries": libraries,
        "operators": describe().splitlines(),
        "environment": {
            name: os.environ.get(name)
            for name in ("DETECTRON2_DATASETS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        },
        "configs": shipped_configs(),
    }


def as_text(info: dict[str, Any]) -> str:
    rows = [(key, str(info[key])) for key in ("fiber_d2", "python", "platform", "cpus")]
    rows.append(("CUDA of torch", str(info["torch_cuda"])))
    rows += [
        (f"GPU {index}", f"{gpu['name']}, {gpu['memory_gib']} GiB, sm {gpu['capability']}")
        for index, gpu in enumerate(info["gpus"])
    ]
    if not info["gpus"]:
        rows.append(("GPU", "none that torch sees"))
    rows += [(name, version or "not installed") for name, version in info["libraries"].items()]
    rows += [(name, value or "not set") for name, value in info["environment"].items()]
    rows.append(("configurations", f"{len(info['configs'])} shipped"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), *info["operators"]])


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="examples:\n  fiber-d2 info\n  fiber-d2 info --json > info.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(argv)
    info = gather()
    sys.stdout.write((json.dumps(info, indent=2) if args.json else as_text(info)) + "\n")
    return 0
