"""How far mixed precision is from float32, on an ordinarily initialised FIBER-B.

    python tools/measure_precision.py [--size H W] [--types bfloat16 float16] [--threads N]
                                      [--config-file C]

Prints one Markdown table: for every group of numbers the root mean square and the largest
difference, over the root mean square and the largest value in float32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import LazyConfig, instantiate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fiber_d2.modeling import FIBER  # noqa: E402
from fiber_d2.modeling.boxes import decode_boxes  # noqa: E402

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "common" / "models" / "fiber_b.py"
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def build(config: Path) -> FIBER:
    """The model, the exchange open and the offsets at work, which start at zero otherwise."""
    node = LazyConfig.load(str(config)).model
    node.backbone.vision.update(drop_path=0.0, alpha_init=0.5)
    node.backbone.text.update(dropout=0.0, alpha_init=0.5)
    node.backbone.neck.update(drop_block=0.0)
    node.head.tower.zero_init_offsets = False
    torch.manual_seed(0)
    return instantiate(node).train()


def run(model: FIBER, size: Sequence[int], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """One training step's numbers; gradients of all parameters as one vector."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *size, generator=generator)
    tokens = 24
    vocabulary = model.backbone.text.embeddings.word.num_embeddings
    ids = torch.randint(3, vocabulary, (2, tokens), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    height, width = size
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.4, 0.1, 0.95, 0.6]]).expand(2, -1, -1)
    boxes = boxes * torch.tensor([width, height, width, height])
    positive = torch.zeros(2, 2, tokens, dtype=torch.bool)
    positive[:, 0, 1:3] = positive[:, 1, 5] = True
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        features = model.backbone(images, ids, mask)
        outputs = model.head(features.pyramid, features.text, mask)
        valid = torch.ones(2, 2, dtype=torch.bool)
        losses = model.head.losses(outputs, mask, boxes, valid, positive)
    # float16 gradients need loss scaling, as in the training step.
    scale = 1024.0 if dtype == torch.float16 else 1.0
    model.zero_grad()
    (sum(losses.values()) * scale).backward()
    gradients = [p.grad.flatten() / scale for p in model.parameters() if p.grad is not None]
    anchors = torch.cat(outputs.anchors)
    found = {f"c{i}": x for i, x in enumerate(features.stages, start=3)}
    found.update({f"p{i}": x for i, x in enumerate(features.pyramid, start=3)})
    found["text"] = features.text
    found["dynamic head"] = torch.cat([x.flatten(2) for x in outputs.features], dim=2)
    found["token logits"] = outputs.token_logits
    found["token scores"] = outputs.token_logits.sigmoid()
    found["boxes (pixels)"] = decode_boxes(outputs.box_deltas, anchors)
    found["centerness"] = outputs.centerness
    found.update({name.replace("_", " "): value for name, value in losses.items()})
    found["gradient"] = torch.cat(gradients)
    return {name: value.detach().float() for name, value in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), help="height and width")
    parser.add_argument("--types", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--config-file", type=Path, default=CONFIG)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build(args.config_file)
    exact = run(model, args.size, None)
    print("| numbers | type | rms | largest | largest, absolute |\n|---|---|---|---|---|")
    for kind in args.types:
        start = time.perf_counter()
        for name, value in run(model, args.size, PRECISIONS[kind]).items():
            difference = (value - exact[name]).abs()
            rms = difference.square().mean().sqrt() / exact[name].square().mean().sqrt()
            largest = difference.max()
            relative = largest / exact[name].abs().max()
            print(f"| {name} | {kind} | {rms:.1e} | {relative:.1e} | {largest:.1e} |")
        print(f"{kind}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
