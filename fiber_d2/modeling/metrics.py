"""Numbers that a model comes across and that are no losses, for whoever watches the training.

They are not in the dictionary of losses because trainers, Detectron2's among them, add up all that
is in there; nor in Detectron2's EventStorage, which makes the host wait for every number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_collectors: list[dict[str, torch.Tensor]] = []


def record_metric(name: str, value: torch.Tensor) -> None:
    """Hand a scalar to the innermost :func:`collected_metrics`; without one it is dropped."""
    if _collectors:
        _collectors[-1][name] = value.detach()


@contextmanager
def collected_metrics() -> Iterator[dict[str, torch.Tensor]]:
    """The metrics recorded inside, by name: scalars that stay on their device."""
    found: dict[str, torch.Tensor] = {}
    _collectors.append(found)
    try:
        yield found
    finally:
        _collectors.pop()
