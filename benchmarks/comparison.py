"""Product and plain model beside each other: what model, chunks and training_step have in common.

Both have the same weights, drawn at random; the exchange between the towers is open, offsets of the
head are at work, and the threshold lets through a trained model's number of candidates. They agree
before anything is timed. Then they take turns, so that both see the same machine. Memory is that of
processes of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from machine import describe_machine, memory_mib, spread
from reference import Outputs, ReferenceFIBER
from reference_tasks import reference_detect
from torch import nn

from fiber_d2.layers.compiled import is_compiled
from fiber_d2.modeling import FIBER
from fiber_d2.modeling.postprocess import aggregate_token_scores
from fiber_d2.structures import Prompt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
CONFIGS = {"full": "fiber_b", "small": "fiber_tiny"}
TOLERANCE = 1e-4
# Pairs of location and class beyond the score threshold, of one prompt.
CANDIDATES = 2000
VARIANTS = ("reference", "product", "product bfloat16")


def build_product(size: str) -> FIBER:
    """In evaluation mode; "full" is FIBER-B and "small" the quickstart's model."""
    torch.manual_seed(0)
    config = LazyConfig.load(str(ROOT / f"configs/common/models/{CONFIGS[size]}.py")).model
    model = instantiate(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.5)
        for block in model.head.tower:
            # Offsets of about a pixel, as trained ones have.
            nn.init.normal_(block.offset.weight, std=block.offset.weight[0].numel() ** -0.5)
    return model


def make_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=generator) * 255
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    noise = torch.randn(3, height, width, generator=generator) * 8
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def make_prompt(
    model: FIBER, lengths: Sequence[int], *, first_id: int = 0, tokens: int | None = None
) -> Prompt:
    """A caption of random words; class k has ``lengths[k]`` tokens and one of a separator after it.

    Args:
        model: it is asked for the size of its vocabulary.
        lengths: of the classes.
        first_id: target id of the first one.
        tokens: of the caption, which further words fill up; None for what the classes need.
    """
    needed = sum(lengths) + len(lengths) + 2
    tokens = needed if tokens is None else tokens
    if needed > tokens:
        raise ValueError(f"Classes of {needed} tokens do not fit in a caption of {tokens}.")
    positive_map = torch.zeros(len(lengths), tokens)
    start = 1
    for number, length in enumerate(lengths):
        positive_map[number, start : start + length] = 1 / length
        start += length + 1
    generator = torch.Generator().manual_seed(first_id)
    vocabulary = model.backbone.text.embeddings.word.num_embeddings
    ids = torch.randint(3, vocabulary, (tokens,), generator=generator)
    mask = torch.ones(tokens, dtype=torch.bool)
    return Prompt("", ids, mask, positive_map, torch.arange(len(lengths)) + first_id)


@torch.no_grad()
def product_outputs(model: FIBER, image: torch.Tensor, prompt: Prompt) -> Outputs:
    images = model.preprocess_images([{"image": image}])
    ids, mask = model.pad_prompts([prompt])
    features = model.backbone(images.tensor, ids, mask)
    found = model.head(features.pyramid, features.text, mask)
    return Outputs(found.anchors, found.token_logits, found.box_deltas, found.centerness)


@torch.no_grad()
def calibrate(model: FIBER, outputs: Outputs, prompt: Prompt) -> None:
    """Set spread and prior of the token logits so that ``CANDIDATES`` pass the threshold.

    The classes of random weights are all much alike; what the classes of a trained model are not.
    """
    head = model.head
    logits = outputs.token_logits[0] - head.prior_bias
    factor = 1 / logits.std()
    head.log_scale.sub_(factor.log())
    head.text_bias.mul_(factor)
    low, high = -20.0, 10.0
    for _ in range(20):
        middle = (low + high) / 2
        scores = (logits * factor + middle).sigmoid()
        scores = aggregate_token_scores(scores[None], prompt.positive_map[None])
        if int((scores > head.postprocessor.score_thresh).sum()) > CANDIDATES:
            high = middle
        else:
            low = middle
    head.prior_bias.fill_(low)


def compare(found: torch.Tensor, expected: torch.Tensor, what: str) -> float:
    """The largest difference over the largest number; more than the tolerance ends the program."""
    worst = float(((found - expected).abs().max() / expected.abs().max()).detach())
    if not worst <= TOLERANCE:
        raise SystemExit(f"{what}: product and reference differ by {worst:.1e}, nothing to time")
    return worst


def check_outputs(
    model: FIBER, reference: ReferenceFIBER, image: torch.Tensor, prompt: Prompt
) -> dict[str, float]:
    """Of the heads, for one image and one prompt; relative differences."""
    ours = product_outputs(model, image, prompt)
    with torch.no_grad():
        theirs = reference(*reference.prepare([image], [prompt]))
    return {
        "token_logits": compare(
            ours.token_logits, theirs.token_logits[..., : prompt.num_tokens], "token logits"
        ),
        "box_deltas": compare(ours.box_deltas, theirs.box_deltas, "box deltas"),
        "centerness": compare(ours.centerness, theirs.centerness, "centerness"),
    }


def share_found(ours: Any, theirs: Any) -> float:
    """Share of the reference's detections that the product has, too: same class, score within 1e-3
    and corners within 0.1 pixels. Near-equal overlaps and scores may fall either way."""
    same = theirs.classes[:, None] == ours.pred_classes[None, :]
    same &= (theirs.scores[:, None] - ours.scores[None, :]).abs() < 1e-3
    corners = ours.pred_boxes.tensor
    same &= (theirs.boxes[:, None] - corners[None]).abs().amax(dim=-1) < 0.1
    return float(same.any(dim=1).float().mean()) if len(theirs.scores) else 1.0


def precision(variant: str) -> Any:
    """A context for the variant's passes."""
    if variant.endswith("bfloat16"):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


class PartTimer:
    """Seconds in the forward passes of parts that both models name alike, since the last reset."""

    PARTS = {
        "image tower": r"backbone\.swin\.(patch_embed\.(proj|norm)|stages\.\d+"
        r"\.(blocks\.\d+|downsample))",
        "text tower": r"backbone\.text\.(embeddings|layers\.\d+)",
        "pyramid": r"backbone\.neck",
        "dynamic head": r"head\.tower\.\d+",
    }

    def __init__(self, model: nn.Module) -> None:
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        self._start = 0.0
        for name, module in model.named_modules():
            for part, pattern in self.PARTS.items():
                if re.fullmatch(pattern, name):
                    module.register_forward_pre_hook(self._before)
                    module.register_forward_hook(self._after(part))

    def _before(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def _after(self, part: str) -> Callable[..., None]:
        def add(*_: Any) -> None:
            self.seconds[part] += time.perf_counter() - self._start

        return add

    def reset(self) -> dict[str, float]:
        """What was found."""
        found, self.seconds = self.seconds, dict.fromkeys(self.PARTS, 0.0)
        return found


def detection_passes(
    model: FIBER,
    reference: ReferenceFIBER,
    image: torch.Tensor,
    asked: Prompt | Sequence[Prompt],
    timed: Sequence[Prompt],
    variants: Sequence[str],
) -> tuple[dict[str, Callable[[], dict[str, float]]], Callable[[], dict[str, float]]]:
    """``passes`` and ``check_after`` of a case whose variants detect things in an image.

    Args:
        model, reference, image: of the work.
        asked: what the product is asked for.
        timed: what the reference is asked for, of which it may do a part.
        variants: those wanted.
    """
    detections = {}
    timers = {"reference": PartTimer(reference), "product": PartTimer(model)}

    def one_pass(variant: str) -> Callable[[], dict[str, float]]:
        timer = timers[variant.split()[0]]

        def run() -> dict[str, float]:
            timer.reset()
            if variant == "reference":
                detections[variant] = reference_detect(reference, image, timed)
            else:
                with precision(variant):
                    (found,) = model([{"image": image, "prompt": asked}])
                detections[variant] = found["instances"]
            return timer.reset()

        return run

    def check_after() -> dict[str, float]:
        share = share_found(detections["product"], detections["reference"])
        return {"detections_missing": 1 - share}

    return {variant: one_pass(variant) for variant in variants}, check_after


@dataclass
class Case:
    """What a benchmark does.

    Attributes:
        passes: per variant, one pass; what it returns are seconds of its parts.
        check: ends the program where product and reference differ; how far they do.
        check_after: how far apart what the timed passes found is; written down, ends nothing.
        facts: about the work, for the result file.
        factors: by which the seconds of a variant are multiplied, as it does a part of the work.
    """

    passes: Mapping[str, Callable[[], dict[str, float]]]
    check: Callable[[], dict[str, float]]
    facts: dict[str, Any]
    check_after: Callable[[], dict[str, float]] = dict
    factors: dict[str, float] = field(default_factory=dict)


def measure_memory(case: Case, variant: str) -> dict[str, int]:
    """The second of two passes: libraries allocate what they keep in the first one."""
    case.passes[variant]()
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    case.passes[variant]()
    peak = memory_mib("VmHWM")
    return {"peak_mib": round(peak), "growth_mib": round(peak - before)}


def gflops(kind: torch.dtype, side: int = 2048, repeats: int = 5) -> float:
    """Of square matrix products here and now: what the times are to be judged by."""
    left, right = torch.ones(side, side, dtype=kind), torch.ones(side, side, dtype=kind)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return round(2 * side**3 / min(seconds[1:]) / 1e9, 1)


def time_passes(case: Case, repeats: int) -> dict[str, Any]:
    """Rounds in which each variant makes a pass."""
    seconds: dict[str, list[float]] = {name: [] for name in case.passes}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in case.passes}
    for number in range(repeats):
        for name, one_pass in case.passes.items():
            factor = case.factors.get(name, 1.0)
            start = time.perf_counter()
            found = one_pass()
            seconds[name].append((time.perf_counter() - start) * factor)
            parts[name].append({part: value * factor for part, value in found.items()})
        times = ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in case.passes)
        print(f"round {number + 1} of {repeats}: {times}", file=sys.stderr, flush=True)
    return {
        name: {
            "seconds": spread(seconds[name]),
            "share_of_reference": spread(
                [ours / theirs for ours, theirs in zip(seconds[name], seconds["reference"])]
            ),
            "parts": {
                part: round(statistics.median(found[part] for found in parts[name]), 3)
                for part in parts[name][0]
            },
        }
        for name in case.passes
    }


def main(
    name: str,
    description: str,
    build: Callable[[argparse.Namespace, Sequence[str]], Case],
    *,
    repeats: int,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Command line of a benchmark.

    Args:
        name: of its script and of its result file.
        description: its docstring.
        build: from the arguments and the variants wanted to the work.
        repeats: the usual number of rounds.
        options: adds further ones.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=CONFIGS, default="full")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="the default is results/ for --size full")
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    options(parser)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}, but at least one round is needed")
    torch.set_num_threads(args.threads)
    if args.memory is not None:
        print(json.dumps(measure_memory(build(args, (args.memory,)), args.memory)))
        return 0
    given = sys.argv[1:]
    # In front of the rest: processes that measure memory are small while this one has no models.
    # With this, glibc asks the system for each larger piece: the peak is of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    memory = {}
    for variant in VARIANTS:
        command = [sys.executable, "-W", "ignore", str(RESULTS.parent / f"{name}.py"), *given]
        done = subprocess.run(
            [*command, "--memory", variant],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
        memory[variant] = json.loads(done.stdout.splitlines()[-1])
        print(f"memory, {variant}: {memory[variant]}", file=sys.stderr, flush=True)
    case = build(args, VARIANTS)
    checks = case.check()
    print(f"differences: {checks}", file=sys.stderr, flush=True)
    rates = {"float32": gflops(torch.float32), "bfloat16": gflops(torch.bfloat16)}
    variants = time_passes(case, args.repeats)
    for variant, found in variants.items():
        found["memory"] = memory[variant]
    report = {
        "command": " ".join([f"python -m benchmarks {name}", *given]),
        "machine": {**describe_machine("torch", "torchvision"), "threads": args.threads},
        "matrix_product_gflops": rates,
        "compiled_deformable_convolution": is_compiled(),
        "size": args.size,
        "work": case.facts,
        "repeats": args.repeats,
        "largest_relative_differences": checks | case.check_after(),
        "variants": variants,
    }
    text = json.dumps(_rounded(report), indent=2) + "\n"
    out = args.out or (RESULTS / f"{name}.json" if args.size == "full" else None)
    if out is None:
        print(text, end="")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    return 0


def _rounded(value: Any) -> Any:
    """Differences to two digits; the rest as it is."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, float) and value and abs(value) < 1e-2:
        return round(value, 1 - math.floor(math.log10(abs(value))))
    return value
