"""Number formats of mixed precision, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

LOW_PRECISION: Mapping[str, torch.dtype] = MappingProxyType(
    {"bfloat16": torch.bfloat16, "float16": torch.float16}
)


def dtype_of(name: str) -> torch.dtype:
    """The format that autocast computes in.

    Raises:
        ValueError: an unknown name.
    """
    if name not in LOW_PRECISION:
        raise ValueError(
            f"Mixed precision in {name!r} is not known; choose {' or '.join(LOW_PRECISION)}."
        )
    return LOW_PRECISION[name]
