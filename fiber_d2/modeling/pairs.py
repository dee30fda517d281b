"""Images and image-caption pairs: what was computed of an image serves all its captions."""

from __future__ import annotations

import torch


def of_pairs(x: torch.Tensor, image_index: torch.Tensor | None) -> torch.Tensor:
    """What was computed of images ``(B, ...)``, for each pair ``(P, ...)``.

    Args:
        x: one entry per image.
        image_index: ``(P,)``, the image of each pair; None where pairs and images are the same.

    Returns:
        a view where it needs no copy: not to be written to.
    """
    if image_index is None:
        return x
    if len(x) == 1:
        return x.expand(len(image_index), *x.shape[1:])
    return x[image_index]
