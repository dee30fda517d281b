"""One image through the towers and the head, as they are and through torch.compile.

    python -m benchmarks compiled [--backend inductor] [--repeats 7] [--threads N] [--out FILE]

FIBER-B on 480x640 pixels and the quickstart's model on 256x320, each with a caption of 256 tokens,
in float32 and without gradients. The compiler starts with an empty folder of its own, so the first
pass tells what compiling takes; outputs are compared, then both take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comparison import build_product, compare, make_image, make_prompt, product_outputs
from machine import describe_machine, spread

RESULT = Path(__file__).resolve().parent / "results" / "compiled.json"
CASES = {"FIBER-B": ("full", (480, 640)), "quickstart": ("small", (256, 320))}
CLASSES, TOKENS = 80, 256


def measure(size: str, sides: tuple[int, int], backend: str, repeats: int) -> dict[str, Any]:
    model = build_product(size)
    image = make_image(*sides)
    prompt = make_prompt(model, [2] * CLASSES, tokens=TOKENS)
    parts = model.backbone, model.head.tower

    def seconds(name: str | None) -> float:
        for part in parts:
            part.compile_backend = name
        start = time.perf_counter()
        found[name] = product_outputs(model, image, prompt)
        return time.perf_counter() - start

    found: dict[str | None, Any] = {}
    seconds(None)
    first = seconds(backend)
    differences = {
        name: compare(getattr(found[backend], name), getattr(found[None], name), name)
        for name in ("token_logits", "box_deltas", "centerness")
    }
    times: dict[str | None, list[float]] = {None: [], backend: []}
    for _ in range(repeats):
        for name, taken in times.items():
            taken.append(seconds(name))
    return {
        "image": "x".join(map(str, sides)),
        "tokens": TOKENS,
        "first_pass_seconds": round(first, 1),
        "seconds": {"as it is": spread(times[None], 3), backend: spread(times[backend], 3)},
        "largest_relative_differences": {key: float(f"{v:.1e}") for key, v in differences.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of torch (default: as many as it takes)")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for name in args.cases:
            results[name] = measure(*CASES[name], args.backend, args.repeats)
            print(name, results[name], file=sys.stderr, flush=True)
    words = (sys.argv if argv is None else ["", *argv])[1:]
    report = {
        "command": " ".join(["python -m benchmarks compiled", *words]),
        "machine": {**describe_machine("torch"), "threads": torch.get_num_threads()},
        "repeats": args.repeats,
        "results": results,
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
