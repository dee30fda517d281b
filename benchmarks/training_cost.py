"""What a training step of FIBER-B costs: operations, bytes kept, bytes sent; computed, not timed.

    python benchmarks/training_cost.py [--out FILE]

For images of several sizes and captions of 256 tokens, with bfloat16 autocast:

    operations  multiplications and additions (two per multiply-accumulate) of matrix products,
                convolutions and attention in the forward and in the backward pass, counted by torch
    bytes       that autograd keeps between the two passes, with and without activation
                checkpointing; of weights, gradients and optimiser state; of the gradients that
                processes exchange

Tensors have shapes only and hold no numbers, so this takes no GPU and little memory. The losses
themselves (assignment, focal loss) are not counted. From the operations follows a time per step for
an assumed share of a GPU's peak rate, and from the time the images per second that 64 GPUs take.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from activation_checkpointing import Kept, without_numbers
from machine import describe_machine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fiber_d2.layers.compiled import is_compiled
from fiber_d2.layers.linear import onednn_product

RESULT = Path(__file__).resolve().parent / "results" / "training_cost.json"
# Height and width, padded to multiples of 32: the shorter side of the recipes' sizes at 4:3, and
# the largest image there is.
SIZES = ((480, 640), (640, 864), (800, 1088), (800, 1344))
TOKENS = 256
# Dense peak rates of matrix products in half precision, TFLOP/s, by their makers' data sheets.
PEAKS = {"V100": 125.0, "A100": 312.0, "H100 SXM": 989.0}
# Of the peak: an assumption, not a measurement.
UTILISATION = 0.3
GPUS = 64
GIB = 2**30


def forward(model: nn.Module, batch: int, size: tuple[int, int]) -> torch.Tensor:
    """A scalar that every output has a part in, as the losses have."""
    ids = torch.zeros(batch, TOKENS, dtype=torch.int64)
    mask = torch.ones(batch, TOKENS, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.backbone(torch.zeros(batch, 3, *size), ids, mask)
        outputs = model.head(features.pyramid, features.text, mask)
    tensors = [t for t in tree(outputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    return sum(tensor.float().sum() for tensor in tensors)


def tree(value: Any) -> list[Any]:
    """The leaves of nested sequences, dicts and dataclasses."""
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in tree(inner)]
    if isinstance(value, (list, tuple)):
        return [leaf for inner in value for leaf in tree(inner)]
    if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
        return tree(vars(value))
    return [value]


def kept_bytes(setting: str, batch: int, size: tuple[int, int]) -> int:
    with without_numbers(setting) as model:
        kept = Kept(model)
        with kept.counting():
            forward(model, batch, size)
    return kept.bytes


def count_deform_conv(
    x: Any, offset: Any, mask: Any, weight: Any, *rest: Any, out_shape: Any
) -> int:
    """Of its matrix product; torch only knows its own operators."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def count_deform_conv_backward(
    grad: Any, x: Any, offset: Any, mask: Any, weight: Any, *rest: Any, out_shape: Any
) -> int:
    """Two of them, for the gradients of the samples and of the weights."""
    return 2 * 2 * math.prod(grad) * math.prod(weight[1:])


def count_linear(x: Any, weight: Any, *rest: Any, out_shape: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def counted() -> dict[Any, Any]:
    found = {}
    if onednn_product() is not None:
        found[torch.ops.mkldnn._linear_pointwise] = count_linear
    if is_compiled():  # else it consists of operators that torch counts
        found[torch.ops.fiber_d2.deform_conv2d] = count_deform_conv
        found[torch.ops.fiber_d2.deform_conv2d_backward] = count_deform_conv_backward
    return found


def operations(size: tuple[int, int]) -> tuple[int, int]:
    """Of one image, in the forward pass, and in both."""
    counter = FlopCounterMode(display=False, custom_mapping=counted())
    with without_numbers("none") as model, counter:
        loss = forward(model, 1, size)
        first = counter.get_total_flops()
        loss.backward()
        return first, counter.get_total_flops()


def describe(size: tuple[int, int]) -> dict[str, Any]:
    one = {setting: kept_bytes(setting, 1, size) for setting in ("none", "all")}
    two = {setting: kept_bytes(setting, 2, size) for setting in ("none", "all")}
    first, both = operations(size)
    seconds = {gpu: both / (peak * 1e12 * UTILISATION) for gpu, peak in PEAKS.items()}
    return {
        "tflop_forward": round(first / 1e12, 3),
        "tflop_forward_and_backward": round(both / 1e12, 3),
        # Weights in half precision are kept once, whatever the number of images.
        "activations_gib": {
            "first_image": round(one["none"] / GIB, 2),
            "each_further_image": round((two["none"] - one["none"]) / GIB, 2),
        },
        "activations_gib_checkpointed": {
            "first_image": round(one["all"] / GIB, 2),
            "each_further_image": round((two["all"] - one["all"]) / GIB, 2),
        },
        f"seconds_per_image_at_{UTILISATION:.0%}_of_peak": {
            gpu: float(f"{value:.3g}") for gpu, value in seconds.items()
        },
        f"images_per_second_of_{GPUS}_gpus": {
            gpu: round(GPUS / value) for gpu, value in seconds.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    with without_numbers("none") as model:
        parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = {}
    for height, width in SIZES:
        sizes[f"{height}x{width}"] = describe((height, width))
        print(f"{height}x{width}", json.dumps(sizes[f"{height}x{width}"]), flush=True)
    report = {
        "command": "python benchmarks/training_cost.py",
        "computed": f"FIBER-B, {TOKENS} tokens, bfloat16 autocast; nothing was timed",
        "machine": describe_machine("torch"),
        "deformable_convolution": "compiled" if is_compiled() else "PyTorch",
        "parameters_million": round(parameters / 1e6, 1),
        "gib": {
            "weights_float32": round(4 * parameters / GIB, 2),
            "gradients_float32": round(4 * parameters / GIB, 2),
            "adamw_state": round(8 * parameters / GIB, 2),
            "averaged_weights": round(4 * parameters / GIB, 2),
            # Each process sends and receives nearly twice the gradients in a ring.
            "sent_per_process_and_step": round(2 * 4 * parameters * (GPUS - 1) / GPUS / GIB, 2),
        },
        "peak_tflops": PEAKS,
        "sizes": sizes,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
