"""Time and memory of one image with one caption of 256 tokens: product and plain model.

    python -m benchmarks model [--size full|small] [--repeats 5] [--threads N] [--out FILE]

FIBER-B on 800x1216 pixels with 80 classes, from the uint8 image to the detections, in float32, and
the product in bfloat16 autocast as well. `--size small` is the quickstart's model on 128x192.
What is compared, and how, is told in `reference.py` and `comparison.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from comparison import (
    Case,
    build_product,
    calibrate,
    check_outputs,
    compare,
    detection_passes,
    main,
    make_image,
    make_prompt,
    product_outputs,
)
from reference import ReferenceFIBER
from reference_tasks import reference_postprocess
from torch.utils.flop_counter import FlopCounterMode
from training_cost import counted

SIZES = {"full": (800, 1216), "small": (128, 192)}
CLASSES, TOKENS = 80, 256


def build(args: argparse.Namespace, variants: Sequence[str]) -> Case:
    model = build_product(args.size)
    image = make_image(*SIZES[args.size])
    prompt = make_prompt(model, [2] * CLASSES, tokens=TOKENS)
    calibrate(model, product_outputs(model, image, prompt), prompt)
    reference = ReferenceFIBER(model)
    passes, check_after = detection_passes(model, reference, image, prompt, [prompt], variants)

    def check() -> dict[str, float]:
        found = check_outputs(model, reference, image, prompt)
        # Of equal outputs: what is kept does not hang on the last digits then.
        outputs = product_outputs(model, image, prompt)
        size = image.shape[1:]
        (ours,) = model.head.postprocessor(*outputs, prompt.positive_map[None], [tuple(size)])
        theirs = reference_postprocess(model.head.postprocessor, outputs, prompt, size)
        if not torch.equal(ours.pred_classes, theirs.classes):
            raise SystemExit("detections of equal outputs differ: nothing to time")
        found["scores"] = compare(ours.scores, theirs.scores, "scores")
        found["boxes"] = compare(ours.pred_boxes.tensor, theirs.boxes, "boxes")
        return found

    facts = {
        "image": "x".join(map(str, image.shape[1:])),
        "tokens": TOKENS,
        "classes": CLASSES,
    }
    if args.memory is None:
        with FlopCounterMode(display=False, custom_mapping=counted()) as counter:
            product_outputs(model, image, prompt)
        facts["tflop_of_product"] = round(counter.get_total_flops() / 1e12, 3)
    return Case(
        passes=passes,
        check=check,
        check_after=check_after,
        facts=facts,
    )


if __name__ == "__main__":
    sys.exit(main("model", __doc__, build, repeats=5))
