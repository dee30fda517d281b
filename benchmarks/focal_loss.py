"""Time and memory of the token loss on the CPU: compiled, PyTorch path, plain formula.

    python benchmarks/focal_loss.py [--threads N] [--repeats 7] [--out FILE]

Each works from the logits, the index of every anchor's box and the positive map, forward and
backward. The plain formula builds a float target and writes the loss out, and every step keeps
what autograd needs. The three agree to rounding, which is checked first, then take turns, so that
all of them see the same machine. Times are medians, with the smallest and the largest. Memory is
what one pass of each adds to a process at its peak, the gradient of the logits apart, which all of
them hand back. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe_machine, memory_mib, spread

from fiber_d2.layers.compiled import is_compiled, why_not_compiled
from fiber_d2.layers.focal_loss import _PieceByPiece

RESULT = Path(__file__).resolve().parent / "results" / "focal_loss.json"
# images, anchors, boxes, tokens of the batch, real tokens of a caption
CASES = {
    "FIBER-B, 800 x 1216, 256 tokens": (1, 20267, 20, 256, 256),
    "FIBER-B, 480 x 640, 2 images, 40 tokens": (2, 6390, 10, 40, 40),
    "FIBER-B, 800 x 1216, 2 images, padded to 256": (2, 20267, 20, 256, 60),
    "quickstart, 16 images": (16, 341, 4, 16, 12),
}
TOLERANCE = 1e-5
COLUMN, ALPHA, GAMMA = 255, 0.25, 2.0


def compiled(logits, assigned, positive_map, mask):
    return torch.ops.fiber_d2.token_focal_loss(
        logits, assigned, positive_map, mask, COLUMN, ALPHA, GAMMA
    )


def pieces(logits, assigned, positive_map, mask):
    return _PieceByPiece.apply(logits, assigned, positive_map, mask, COLUMN, ALPHA, GAMMA)


def plain(logits, assigned, positive_map, mask):
    positive = (assigned >= 0)[..., None]
    index = assigned.clamp(min=0)[..., None].expand_as(logits)
    targets = positive_map.float().gather(1, index) * positive
    if logits.shape[2] > COLUMN:
        targets[..., COLUMN].masked_fill_(~positive[..., 0], 1)
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    error = probability * (1 - targets) + (1 - probability) * targets
    loss = cross_entropy * error**GAMMA * (ALPHA * targets + (1 - ALPHA) * (1 - targets))
    return (loss * mask[:, None]).sum()


METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "compiled": compiled,
    "PyTorch, piece by piece": pieces,
    "plain formula": plain,
}
PLAIN = "plain formula"


def make_inputs(
    images: int, anchors: int, boxes: int, tokens: int, real: int
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, anchors, tokens, generator=generator) - 3
    assigned = torch.randint(0, boxes, (images, anchors), generator=generator)
    # About one anchor of a hundred has a box.
    assigned[torch.rand(images, anchors, generator=generator) > 0.01] = -1
    positive_map = torch.rand(images, boxes, tokens, generator=generator) < 3 / real
    mask = (torch.arange(tokens) < real).expand(images, -1)
    return [logits.requires_grad_(), assigned, positive_map, mask]


def run(method: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, Any]:
    start = time.perf_counter()
    loss = method(*inputs)
    middle = time.perf_counter()
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    end = time.perf_counter()
    return {"forward": middle - start, "both": end - start, "results": [loss.detach(), gradient]}


def check(found: Mapping[str, Mapping[str, Any]]) -> float:
    """The largest difference to the plain formula, relative to an array's largest number."""
    worst = 0.0
    for name in found.keys() - {PLAIN}:
        for ours, theirs in zip(found[name]["results"], found[PLAIN]["results"]):
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            if not difference <= TOLERANCE:  # nor NaN, which max() below would let through
                raise SystemExit(f"results differ by {difference:.1e}: nothing to time")
            worst = max(worst, difference)
    return worst


def measure(shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    inputs = make_inputs(*shape)
    worst = check({name: run(method, inputs) for name, method in METHODS.items()})
    times: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "both": []} for name in METHODS
    }
    for _ in range(repeats):
        for name, method in METHODS.items():
            found = run(method, inputs)
            for part in ("forward", "both"):
                times[name][part].append(found[part])
    return {
        "shape": dict(zip(("images", "anchors", "boxes", "tokens", "real_tokens"), shape)),
        "largest_relative_difference": worst,
        "seconds": {
            name: {part: spread(values, digits=6) for part, values in parts.items()}
            for name, parts in times.items()
        },
    }


def extra_memory(shape: tuple[int, ...]) -> dict[str, float]:
    """MiB that a forward and backward pass of each method adds beside the gradient."""
    inputs = make_inputs(*shape)
    gradient = inputs[0].numel() * inputs[0].element_size() / 2**20
    result = {}
    for name, method in METHODS.items():
        run(method, inputs)  # the libraries' own buffers
        before = memory_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        run(method, inputs)
        result[name] = round(max(0.0, memory_mib("VmHWM") - before - gradient), 1)
    return result


def extra_memory_of_another_process(threads: int) -> dict[str, dict[str, float]]:
    # With this, glibc asks the system for each larger piece: the peak is of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    arguments = [sys.executable, __file__, "--memory", "--threads", str(threads)]
    result = subprocess.run(
        arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not is_compiled():
        raise SystemExit(f"the compiled operators are missing: {why_not_compiled()}")
    torch.set_num_threads(args.threads)
    if args.memory:
        print(json.dumps({name: extra_memory(shape) for name, shape in CASES.items()}))
        return
    memory = extra_memory_of_another_process(args.threads)
    result: dict[str, Any] = {
        "command": "python benchmarks/focal_loss.py "
        f"--threads {args.threads} --repeats {args.repeats}",
        "machine": {**describe_machine("torch"), "threads": args.threads},
        "repeats": args.repeats,
        "cases": {},
    }
    for name, shape in CASES.items():
        found = result["cases"][name] = measure(shape, args.repeats)
        found["extra_memory_mib"] = memory[name]
        seconds = {method: times["both"]["median"] for method, times in found["seconds"].items()}
        faster = {key: round(value / seconds["compiled"], 2) for key, value in seconds.items()}
        print(f"{name}: {faster} times the compiled time, MiB: {memory[name]}", flush=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
