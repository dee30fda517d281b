"""Time and memory of one training step: product and plain model.

    python -m benchmarks training_step [--size full|small] [--repeats 5] [--threads N] [--out FILE]

FIBER-B on one image of 480x640 pixels with a caption of 256 tokens and 8 boxes: forward pass,
losses and backward pass, all dropouts at work, no optimiser, in float32, and the product in
bfloat16 autocast as well. Losses and gradients are compared without dropouts. `--size small` is the
quickstart's model on 128x192 pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
from comparison import (
    TOLERANCE,
    Case,
    build_product,
    compare,
    main,
    make_image,
    make_prompt,
    precision,
)
from detectron2.structures import Boxes, Instances
from reference import ReferenceFIBER
from reference_tasks import reference_losses

SIZES = {"full": (480, 640), "small": (128, 192)}
CLASSES, TOKENS, BOXES = 80, 256, 8


def build(args: argparse.Namespace, variants: Sequence[str]) -> Case:
    model = build_product(args.size)
    height, width = SIZES[args.size]
    prompt = make_prompt(model, [2] * CLASSES, tokens=TOKENS)
    generator = torch.Generator().manual_seed(0)
    frame = torch.tensor([width, height])
    low = torch.rand(BOXES, 2, generator=generator) * 0.6 * frame
    sides = (0.1 + 0.3 * torch.rand(BOXES, 2, generator=generator)) * frame
    classes = torch.randint(0, CLASSES, (BOXES,), generator=generator)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([low, low + sides], dim=1))
    instances.gt_positive_map = prompt.positive_map[classes] > 0
    batch = [{"image": make_image(height, width), "prompt": prompt, "instances": instances}]
    reference = ReferenceFIBER(model)

    def one_pass(variant: str) -> Callable[[], dict[str, float]]:
        chosen = reference if variant == "reference" else model

        def run() -> dict[str, float]:
            chosen.train()
            chosen.zero_grad()
            start = time.perf_counter()
            if variant == "reference":
                losses = reference_losses(reference, batch)
            else:
                with precision(variant):
                    losses = model(batch)
            middle = time.perf_counter()
            sum(losses.values()).backward()
            return {"forward": middle - start, "backward": time.perf_counter() - middle}

        return run

    def check() -> dict[str, float]:
        model.eval()
        reference.eval()
        ours, theirs = model._losses(batch), reference_losses(reference, batch)
        found = {name: compare(ours[name], theirs[name], name) for name in theirs}
        sum(ours.values()).backward()
        sum(theirs.values()).backward()
        parameters = dict(reference.named_parameters())
        largest = max(float(p.grad.abs().max()) for p in parameters.values())
        # By torch, whose max() is NaN where one of them is.
        differences = [
            (parameters[name].grad - p.grad).abs().max() for name, p in model.named_parameters()
        ]
        worst = float(torch.stack(differences).max())
        found["gradients"] = worst / largest
        if not found["gradients"] <= TOLERANCE:
            raise SystemExit(f"gradients differ by {found['gradients']:.1e}: nothing to time")
        return found

    return Case(
        passes={variant: one_pass(variant) for variant in variants},
        check=check,
        facts={"image": f"{height}x{width}", "tokens": TOKENS, "boxes": BOXES},
    )


if __name__ == "__main__":
    sys.exit(main("training_step", __doc__, build, repeats=5))
