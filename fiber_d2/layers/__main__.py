"""``python -m fiber_d2.layers``: which operators run compiled here, and why others do not."""

from __future__ import annotations

import sys

import torch

from .compiled import is_compiled, why_not_compiled
from .linear import onednn_product


def describe() -> str:
    """One line for each operator and kind of device."""
    cpu, loss = "compiled (csrc/deform_conv.cpp)", "compiled (csrc/focal_loss.cpp)"
    if not is_compiled():
        cpu = f"PyTorch (embedding_bag, matrix product); compiled operators: {why_not_compiled()}"
        loss = "PyTorch, a piece of the anchors at a time"
    rows = [
        ("modulated_deform_conv2d, CPU", cpu),
        ("modulated_deform_conv2d, CUDA", "torchvision"),
        ("assigned_token_focal_loss, CPU", loss),
        ("assigned_token_focal_loss, CUDA", "PyTorch, a piece of the anchors at a time"),
        ("linear, CPU, float32", "PyTorch" if onednn_product() is None else "oneDNN"),
        ("class_aware_nms", "torchvision for continuous boxes, PyTorch for the legacy +1"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {state}" for name, state in rows]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = torch.get_num_threads()
    return "\n".join([f"torch {torch.__version__}, {threads} CPU threads, {gpu}", *lines])


if __name__ == "__main__":
    sys.stdout.write(describe() + "\n")
