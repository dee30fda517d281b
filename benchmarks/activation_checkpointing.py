"""Memory and time of a training step with activation checkpointing of the towers and of the head.

    python benchmarks/activation_checkpointing.py [--repeats 5] [--out FILE]

Two models, and for each no checkpointing, that of one part, and that of all three:

    computed   FIBER-B, one image of 800x1344 pixels and 256 tokens, bfloat16 autocast: the bytes
               that autograd keeps between the two passes, from the shapes of tensors that hold no
               numbers. While the backward pass computes a block again, what that block keeps comes
               on top.
    measured   FIBER-B of half the width (all blocks, heads and levels), one image of 320x320, 64
               tokens, float32: processor time of forward, losses and backward, the bytes kept, and
               by how much the memory of the process grew at most. Settings run in turns, each in a
               process of its own that has made one step before; losses must be equal to the last
               bit. Memory is measured apart, in processes that give back at once what they free.

The compiled deformable convolution of the CPU keeps its inputs only, as that of GPUs does; without
it (`python -m fiber_d2.layers` tells) the tower keeps the sampled maps as well. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from machine import describe_machine, memory_mib, spread
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fiber_d2.layers.compiled import is_compiled
from fiber_d2.modeling.dyhead import DynamicHeadBlock
from fiber_d2.modeling.roberta import RobertaLayer
from fiber_d2.modeling.swin import SwinBlock
from fiber_d2.structures import Prompt

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).resolve().parent / "results" / "activation_checkpointing.json"
SETTINGS = {
    "none": (),
    "vision": ("vision",),
    "text": ("text",),
    "tower": ("tower",),
    "all": ("vision", "text", "tower"),
}
BLOCKS = (SwinBlock, RobertaLayer, DynamicHeadBlock)
MIB = 2**20


def model_config(setting: str, *, half: bool) -> Any:
    model = LazyConfig.load(str(ROOT / "configs/common/models/fiber_b.py")).model
    parts = SETTINGS[setting]
    vision, text, tower = model.backbone.vision, model.backbone.text, model.head.tower
    vision.checkpoint, text.checkpoint = "vision" in parts, "text" in parts
    tower.checkpoint = "tower" in parts
    if half:
        vision.embed_dim = 64
        text.update(dim=384, mlp_dim=1536, image_dims=[256, 256, 256, 256, 512, 512])
        model.backbone.neck.update(in_channels=[128, 256, 512], out_channels=128)
    return model


@contextmanager
def without_numbers(setting: str) -> Iterator[nn.Module]:
    """FIBER-B in training mode; inside, all tensors have shapes only."""
    with torch.device("meta"):
        model = instantiate(model_config(setting, half=False)).train()
    with FakeTensorMode():
        for module in model.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(tensor.shape))
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        yield model


class Kept:
    """Bytes of what autograd keeps, each storage once; parameters, which are there anyway, are not.

    Attributes:
        bytes: so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._seen = {p.untyped_storage()._cdata: None for p in model.parameters()}

    @contextmanager
    def counting(self) -> Iterator[None]:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = storage  # held, or its address would serve again
                self.bytes += storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def compute(setting: str) -> dict[str, float]:
    """Bytes kept by FIBER-B, in MiB, and those of the block that keeps most."""
    largest = start = 0
    with without_numbers(setting) as model:
        kept = Kept(model)

        def before(module: nn.Module, inputs: Any) -> None:
            nonlocal start
            start = kept.bytes

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal largest
            largest = max(largest, kept.bytes - start)

        for module in model.modules():
            if isinstance(module, BLOCKS):
                module.register_forward_pre_hook(before)
                module.register_forward_hook(after)
        ids = torch.zeros(1, 256, dtype=torch.int64)
        mask = torch.ones(1, 256, dtype=torch.bool)
        with kept.counting(), torch.autocast("cpu", torch.bfloat16):
            features = model.backbone(torch.zeros(1, 3, 800, 1344), ids, mask)
            model.head(features.pyramid, features.text, mask)
    found = {"kept_mib": round(kept.bytes / MIB)}
    if setting == "none":
        found["largest_block_mib"] = round(largest / MIB)
    return found


def make_batch(size: int = 320, tokens: int = 64) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(8, 2, generator=generator) * size * 0.6
    positive_map = torch.zeros(8, tokens, dtype=torch.bool)
    positive_map[torch.arange(8), 1 + torch.arange(8)] = True
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.cat([low, low + size * 0.3], dim=1))
    instances.gt_positive_map = positive_map
    ids = torch.randint(3, 50000, (tokens,), generator=generator)
    real = torch.ones(tokens, dtype=torch.bool)
    prompt = Prompt("", ids, real, positive_map.float(), torch.arange(8))
    image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
    return [{"image": image, "prompt": prompt, "instances": instances}]


def step(model: nn.Module, batch: list[dict[str, Any]], kept: Kept | None = None) -> list[float]:
    torch.manual_seed(1)
    if kept is None:
        losses = model(batch)
    else:
        with kept.counting():
            losses = model(batch)
    sum(losses.values()).backward()
    return [loss.item() for loss in losses.values()]


def measure(setting: str) -> dict[str, Any]:
    """One step, after another: time, memory and losses."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = instantiate(model_config(setting, half=True)).train()
    batch = make_batch()
    step(model, batch)  # gradients are there from now on
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    losses = step(model, batch)
    seconds = time.process_time() - start
    growth = memory_mib("VmHWM") - before
    kept = Kept(model)
    step(model, batch, kept)
    return {
        "cpu_seconds": seconds,
        "peak_growth_mib": growth,
        "kept_mib": kept.bytes / MIB,
        "losses": losses,
    }


def run(task: str, setting: str, **environment: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", __file__, "--task", task, "--setting", setting]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    print(task, setting, done.stdout.splitlines()[-1], flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--task", choices=("compute", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.task is not None:
        print(json.dumps({"compute": compute, "measure": measure}[args.task](args.setting)))
        return 0
    computed = {setting: run("compute", setting) for setting in SETTINGS}
    # With this, glibc asks the system for each larger piece of memory: the peak is of what is in
    # use, but steps take longer.
    memory = {
        setting: run("measure", setting, MALLOC_MMAP_THRESHOLD_="131072") for setting in SETTINGS
    }
    rounds = [
        {setting: run("measure", setting) for setting in SETTINGS} for _ in range(args.repeats)
    ]
    losses = [found["losses"] for r in (memory, *rounds) for found in r.values()]
    if any(found != losses[0] for found in losses):
        print("error: losses differ", file=sys.stderr)
        return 1
    measured = {}
    for setting in SETTINGS:
        found = [r[setting] for r in rounds]
        measured[setting] = {
            "kept_mib": round(memory[setting]["kept_mib"]),
            "peak_growth_mib": round(memory[setting]["peak_growth_mib"]),
            "cpu_seconds": spread([f["cpu_seconds"] for f in found], 2),
            "times_as_long": spread(
                [r[setting]["cpu_seconds"] / r["none"]["cpu_seconds"] for r in rounds], 2
            ),
        }
    report = {
        "command": f"python benchmarks/activation_checkpointing.py --repeats {args.repeats}",
        "machine": describe_machine("torch"),
        "compiled_deformable_convolution": is_compiled(),
        "computed": {"model": "FIBER-B, one image of 800x1344, 256 tokens, bfloat16", **computed},
        "measured": {
            "model": "FIBER-B at half width, one image of 320x320, 64 tokens, float32",
            **measured,
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
