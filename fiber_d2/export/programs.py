"""Programs of ``torch.export``."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import torch
import torchvision  # noqa: F401 (programs may hold its operators)
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental import _config

from .parts import FusedPart, Graph


def check_torch() -> None:
    """
    Raises:
        ValueError: this torch is too old.
    """
    if "check_guards" not in inspect.signature(ExportedProgram.module).parameters:
        raise ValueError(
            f"torch {torch.__version__} is too old for exports: they need torch 2.9 or later."
        )


def trace(graph: Graph) -> ExportedProgram:
    """The program of a graph, for every size of image and text."""
    shapes: tuple[object, ...] = tuple(graph.dynamic_shapes.values())
    if isinstance(graph.module, FusedPart):
        shapes = (shapes,)  # its one parameter is *inputs
    # Where gradients may be wanted, attention in windows is one formula for all sizes.
    graph.module.requires_grad_(True)
    # Sizes of 1 are sizes as all others. Without this, tracing takes ten times as long, too.
    with _config.patch(backed_size_oblivious=True):
        program = torch.export.export(
            graph.module, tuple(graph.arguments.values()), dynamic_shapes=shapes, strict=False
        )
    # The program's weights are the module's.
    for weight in program.state_dict.values():
        weight.requires_grad_(False)
    # What torch noticed of the traced sizes (that the coarsest map has more than one place, say) is
    # kept as a limit of sizes, too; the operators in the graph know none.
    limits = program.range_constraints
    limits.update({size: type(limit)(1, limit.upper) for size, limit in limits.items()})
    return program


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a ``.pt2`` file."""
    program.example_inputs = None  # they would be most of a small model's file
    torch.export.save(program, path)


def load_program(path: str | os.PathLike[str]) -> nn.Module:
    """A ``.pt2`` file as a module that takes the inputs in their order.

    Torch unpickles parts of it, which can run code: load only files that you trust.

    The same is ``torch.export.load(path).module(check_guards=False)``, without this package. Guards
    are off, because they hold what torch noticed of the traced sizes (that a map has more than one
    window, say), not what the program needs.

    Raises:
        FileNotFoundError: no such file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The exported program {os.fspath(path)} does not exist.")
    return torch.export.load(path).module(check_guards=False)
