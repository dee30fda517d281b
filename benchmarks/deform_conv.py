"""Time of modulated deformable convolution on the CPU: compiled, PyTorch path, torchvision.

    python benchmarks/deform_conv.py [--threads N] [--repeats 7] [--out FILE]

The cases are levels of FIBER-B's head at 800 x 1216 pixels and of the quickstart's. The three
agree to rounding, which is checked first, forward and backward, then take turns, so that all of
them see the same machine. A plain 3x3 convolution of the same shapes is timed beside them, as a
floor, and the compiled operator with map and weight in bfloat16. Times are medians, with the
smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe_machine, spread
from torchvision.ops import deform_conv2d

from fiber_d2.layers.compiled import is_compiled, why_not_compiled
from fiber_d2.layers.deform_conv import _deform_conv2d_embedding_bag

RESULT = Path(__file__).resolve().parent / "results" / "deform_conv.json"
# batch, channels, height, width, stride
CASES = {
    "FIBER-B p3, 800 x 1216": (1, 256, 100, 152, 1),
    "FIBER-B p4, 800 x 1216": (1, 256, 50, 76, 1),
    "FIBER-B p3 to p4": (1, 256, 100, 152, 2),
    "quickstart p3, 16 images": (16, 64, 16, 16, 1),
}
TOLERANCES = {"compiled": 1e-4, "embedding_bag": 1e-4, "compiled, bfloat16": 2e-2}


def compiled(x, offset, mask, weight, bias, stride):
    return torch.ops.fiber_d2.deform_conv2d(x, offset, mask, weight, bias, stride, 1)


def compiled_bfloat16(x, offset, mask, weight, bias, stride):
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    return compiled(x, offset, mask, weight, bias, stride)


def embedding_bag(x, offset, mask, weight, bias, stride):
    return _deform_conv2d_embedding_bag(x, offset, mask, weight, bias, stride=stride, padding=1)


def torchvision(x, offset, mask, weight, bias, stride):
    return deform_conv2d(x, offset, weight, bias, stride, 1, mask=mask)


def convolution(x, offset, mask, weight, bias, stride):
    return F.conv2d(x, weight, bias, stride, 1)


METHODS = {
    "compiled": compiled,
    "compiled, bfloat16": compiled_bfloat16,
    "embedding_bag": embedding_bag,
    "torchvision": torchvision,
    "plain convolution": convolution,
}


def make_inputs(batch: int, channels: int, height: int, width: int, stride: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    out = [(size - 1) // stride + 1 for size in (height, width)]
    return [
        draw(batch, channels, height, width),
        2 * draw(batch, 18, *out),
        draw(batch, 9, *out).sigmoid(),
        draw(channels, channels, 3, 3) / (3 * channels**0.5),
        draw(channels),
    ]


def run(method: Callable[..., torch.Tensor], inputs: list[Any], stride: int) -> dict[str, Any]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    start = time.perf_counter()
    out = method(*leaves, stride)
    middle = time.perf_counter()
    out.backward(torch.ones_like(out))
    end = time.perf_counter()
    return {
        "forward": middle - start,
        "both": end - start,
        "results": [out.detach(), *(leaf.grad for leaf in leaves)],
    }


def check(found: dict[str, Any]) -> dict[str, float]:
    """The largest difference to torchvision, relative to the largest number of an array."""
    worst: dict[str, float] = {}
    for name, tolerance in TOLERANCES.items():
        for ours, theirs in zip(found[name]["results"], found["torchvision"]["results"]):
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            if not difference <= tolerance:  # nor NaN, which max() below would let through
                raise SystemExit(f"{name}: results differ by {difference:.1e}: nothing to time")
            worst[name] = max(worst.get(name, 0.0), difference)
    return worst


def measure(shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    inputs, stride = make_inputs(*shape), shape[-1]
    worst = check({name: run(method, inputs, stride) for name, method in METHODS.items()})
    times: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "both": []} for name in METHODS
    }
    for _ in range(repeats):
        for name, method in METHODS.items():
            found = run(method, inputs, stride)
            for part in ("forward", "both"):
                times[name][part].append(found[part])
    rows = {
        name: {part: spread(values, digits=5) for part, values in parts.items()}
        for name, parts in times.items()
    }

    def ratio(other: str, part: str) -> float:
        return round(rows[other][part]["median"] / rows["compiled"][part]["median"], 2)

    return {
        "shape": dict(zip(("batch", "channels", "height", "width", "stride"), shape)),
        "largest_relative_difference": worst,
        "seconds": rows,
        "times_faster": {
            other: {
                "forward": ratio(other, "forward"),
                "forward_and_backward": ratio(other, "both"),
            }
            for other in ("embedding_bag", "torchvision")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not is_compiled():
        raise SystemExit(f"the compiled operators are missing: {why_not_compiled()}")
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "command": "python benchmarks/deform_conv.py "
        f"--threads {args.threads} --repeats {args.repeats}",
        "machine": {**describe_machine("torch", "torchvision"), "threads": args.threads},
        "repeats": args.repeats,
        "cases": {},
    }
    for name, shape in CASES.items():
        found = result["cases"][name] = measure(shape, args.repeats)
        faster = found["times_faster"]
        print(f"{name}: {json.dumps(found['seconds']['compiled'])}, times faster: {faster}")
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
