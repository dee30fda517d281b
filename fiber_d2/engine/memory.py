"""What a process of a training needs memory for: counted where it can be, else measured."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import nn

MIB, GIB = 1024**2, 1024**3
# Sides of the parameter whose optimiser state is looked at.
_PROBE_SHAPE = (16, 16)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process; None for what cannot be known before the first step.

    Attributes:
        parameters: weights and buffers of the model.
        gradients: of trainable parameters, once more where processes exchange copies of them.
        optimizer: its state after the first step.
        averaged: the averaged weights.
        activations: of the batch that was measured.
        available: memory of the device; of the CPU, this process's share of the machine's.
    """

    parameters: int
    gradients: int
    optimizer: int | None
    averaged: int
    activations: int | None
    available: int | None

    @property
    def total(self) -> int:
        known = (self.parameters, self.gradients, self.optimizer, self.averaged, self.activations)
        return sum(part for part in known if part is not None)


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the elements of these tensors, each tensor counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in set(tensors))


def estimate_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    averaged: bool = False,
    bucket_views: bool = True,
    activations: int | None = None,
) -> MemoryEstimate:
    """See :class:`MemoryEstimate`.

    Args:
        averaged: whether averaged weights are kept on the device, too.
        bucket_views: of several processes, whether gradients are views of what is exchanged.
        activations: as measured by :func:`measured_activations`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    copies = 1 if bucket_views or comm.get_world_size() == 1 else 2
    weights = num_bytes(model.parameters())
    buffers = num_bytes(model.buffers())
    return MemoryEstimate(
        parameters=weights + buffers,
        gradients=num_bytes(trainable) * copies,
        optimizer=optimizer_bytes(optimizer),
        averaged=weights + buffers if averaged else 0,
        activations=activations,
        available=device_bytes(next(model.parameters()).device),
    )


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int | None:
    """Bytes of the state of an optimiser after its first step.

    A small parameter is given to an optimiser of the same class and settings; what that keeps for
    an element holds for all parameters, which is true of SGD and of Adam and its relatives.

    Returns:
        None for an optimiser that cannot be made from its parameter groups alone.
    """
    total = 0.0
    for group in optimizer.param_groups:
        reference = group["params"][0]
        probe = nn.Parameter(
            torch.zeros(_PROBE_SHAPE, dtype=reference.dtype, device=reference.device)
        )
        try:
            other = type(optimizer)([{**group, "params": [probe]}])
        except TypeError:  # its constructor wants more
            return None
        probe.grad = torch.zeros_like(probe)
        other.step()
        kept = [x for x in other.state[probe].values() if isinstance(x, torch.Tensor)]
        whole = num_bytes(x for x in kept if x.shape == probe.shape)
        scalars = num_bytes(kept) - whole
        elements = sum(p.numel() for p in group["params"])
        total += whole / probe.numel() * elements + scalars * len(group["params"])
    return round(total)


class Activations:
    """Bytes that a forward pass keeps for the backward pass; None before they are known."""

    num_bytes: int | None = None


@contextmanager
def measured_activations(model: nn.Module) -> Iterator[Activations]:
    """Measure what a forward pass inside keeps for its backward pass.

    Counted are the tensors that autograd saves, parameters and buffers left out, each storage
    once; on every device the same. What recomputation (activation checkpointing) saves of a
    block's inputs is not seen.
    """
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    # Whatever is saved lives until the backward pass, so no address is used twice meanwhile.
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        # Without its history: a saved output would keep itself alive.
        return tensor.detach()

    measured = Activations()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield measured
    measured.num_bytes = sum(found.values())


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU, or this process's share of the machine's; None where that is not told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # no such function or name on this system
        return None
    return machine // comm.get_local_size()


def peak_process_bytes() -> int:
    """The most main memory that this process has held at once, its workers left out."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_units(value: int | None) -> str:
    """For people: "1.50 GiB", "20.1 MiB", or "unknown"."""
    if value is None:
        return "unknown"
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.1f} MiB"
