"""Time and memory of one image with 1,203 classes in 31 captions: product and plain model.

    python -m benchmarks chunks [--size full|small] [--repeats 3] [--reference-prompts N]
                                [--threads N] [--out FILE]

FIBER-B on 800x1216 pixels, as LVIS is evaluated: 40 classes to a caption, detections of all
captions merged. The product computes once what does not depend on the caption, the plain model
passes each caption through everything. `--reference-prompts 4` times it on 4 of them and reckons
with 31/4 of that. `--size small` is the quickstart's model on 128x192 pixels with 100 classes in 3.
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
    detection_passes,
    main,
    make_image,
    make_prompt,
    product_outputs,
)
from reference import ReferenceFIBER

SIZES = {"full": (800, 1216), "small": (128, 192)}
CLASSES = {"full": 1203, "small": 100}
CLASSES_PER_PROMPT = 40
# Detections of a caption that LVIS keeps.
DETECTIONS = 300


def build(args: argparse.Namespace, variants: Sequence[str]) -> Case:
    model = build_product(args.size)
    model.head.postprocessor.max_detections = DETECTIONS
    image = make_image(*SIZES[args.size])
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 6, (CLASSES[args.size],), generator=generator)
    prompts, first = [], 0
    for some in lengths.split(CLASSES_PER_PROMPT):
        prompts.append(make_prompt(model, some.tolist(), first_id=first))
        first += len(some)
    calibrate(model, product_outputs(model, image, prompts[0]), prompts[0])
    reference = ReferenceFIBER(model)
    count = min(args.reference_prompts or len(prompts), len(prompts))
    passes, check_after = detection_passes(
        model, reference, image, prompts, prompts[:count], variants
    )

    def check() -> dict[str, float]:
        first = check_outputs(model, reference, image, prompts[0])
        last = check_outputs(model, reference, image, prompts[-1])
        return {name: max(first[name], last[name]) for name in first}

    return Case(
        passes=passes,
        check=check,
        check_after=check_after,
        facts={
            "image": "x".join(map(str, image.shape[1:])),
            "classes": len(lengths),
            "prompts": len(prompts),
            "tokens_of_longest_prompt": max(prompt.num_tokens for prompt in prompts),
            "prompts_timed_of_reference": count,
            "prompt_batch_size_of_product": model.prompt_batch_size,
        },
        factors={"reference": len(prompts) / count},
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference-prompts", type=int, metavar="N")


if __name__ == "__main__":
    sys.exit(main("chunks", __doc__, build, repeats=3, options=options))
