"""Detection in several sizes of an image and in their mirror images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .merging import in_size_range, merge_detections

logger = logging.getLogger(__name__)

Range = tuple[float, float]

# Short sides, and the sizes of boxes that each is trusted with, of the original.
SCALES = (400, 500, 600, 640, 700, 900, 1000, 1100, 1200, 1300, 1400, 1800)
RANGES: tuple[Range, ...] = (
    *[(96, 10000)] * 2,
    *[(64, 10000)] * 3,
    *[(0, 10000)] * 2,
    *[(0, 256)] * 2,
    *[(0, 192)] * 2,
    (0, 96),
)


class FiberWithTTA(nn.Module):
    """A FIBER that looks at every image several times; same inputs, same outputs.

    For evaluation only, and made around a model that has its weights. The inputs' ``image`` holds
    the pixels of the file, not resized (a test loader with ``augmentations=[]``). The prompt may
    be a list, a caption of classes, a sentence or an expression: what a view finds for a target
    is merged with what other views find for it. In mirror images ``mirrored_prompt`` is asked
    where an input has it (a Prompt or list like ``prompt``, with the same targets), so that "the
    left dog" is "the right dog" there; else ``prompt``.

    An image's numbers do not depend on the batch it is in.

    Args:
        model: a :class:`~fiber_d2.modeling.FIBER`.
        scales: lengths of the short side.
        max_size: greatest length of the long side.
        flip: look at the mirror image of each scale, too.
        ranges: for each scale the least and the greatest size of the boxes that are taken from it,
            the square root of their area in the resized image; neither is included. None takes all.
        resize: makes the augmentation of a scale from its short side and ``max_size``.
        view_nms: suppress overlapping boxes in every view, within the model's limits on their
            number. Without it, as in the original, all candidates are merged.
        max_candidates: per view and prompt, by score, without ``view_nms``.
        batch_views: 2 lets an image and its mirror image pass the model together. Sizes never
            share a pass: padding would change their numbers.
        legacy_boxes: the model's corners are inclusive pixels, those of the original's weights; a
            mirrored x is then ``width - 1 - x``. False for a model trained on this project's
            boxes, ``width - x``.
        method, threshold, max_detections: of
            :func:`~fiber_d2.modeling.merging.merge_detections`, per image; so are
            soft_vote_min_score, soft_nms_min_score and soft_nms_sigma.

    Raises:
        ValueError: no scale, another number of ranges, or options that do not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scales: Sequence[int] = SCALES,
        max_size: int = 2500,
        flip: bool = True,
        ranges: Sequence[Sequence[float]] | None = RANGES,
        resize: Callable[[int, int], T.Augmentation] = T.ResizeShortestEdge,
        view_nms: bool = False,
        max_candidates: int = 5000,
        batch_views: int = 1,
        legacy_boxes: bool = False,
        method: str = "nms",
        threshold: float = 0.6,
        max_detections: int = 1000,
        soft_vote_min_score: float = 0.05,
        soft_nms_min_score: float = 0.001,
        soft_nms_sigma: float | None = None,
    ) -> None:
        super().__init__()
        if not scales:
            raise ValueError("scales is empty; give at least one length of the short side.")
        if ranges is not None and len(ranges) != len(scales):
            raise ValueError(
                f"There are {len(scales)} scales but {len(ranges)} ranges: give one (least, "
                "greatest) for each scale, or ranges=None to take boxes of all sizes."
            )
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.training = self.model.training
        self.scales = tuple(scales)
        self.max_size = max_size
        self.flip = flip
        ranges = [(0, math.inf)] * len(scales) if ranges is None else ranges
        self.ranges: tuple[Range, ...] = tuple((low, high) for low, high in ranges)
        self.resize = resize
        self.view_nms = view_nms
        self.max_candidates = max_candidates
        self.batch_views = batch_views
        self.legacy_boxes = legacy_boxes
        self.merge = partial(
            merge_detections,
            method=method,
            threshold=threshold,
            max_detections=max_detections,
            soft_vote_min_score=soft_vote_min_score,
            soft_nms_min_score=soft_nms_min_score,
            soft_nms_sigma=soft_nms_sigma,
            by_score=True,
        )
        self._warned = False
        # A mistaken option is to be found now, not after the first image.
        self.merge(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """As of FIBER in evaluation.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("FiberWithTTA is for evaluation: train the model it wraps.")
        with nullcontext() if self.view_nms else self._all_candidates():
            return [{"instances": self._detect(item)} for item in batched_inputs]

    def _detect(self, item: Mapping[str, Any]) -> Instances:
        pixels = item["image"].shape[-2:]
        size = (item.get("height", pixels[0]), item.get("width", pixels[1]))
        if size != tuple(pixels) and not self._warned:
            self._warned = True
            logger.warning(
                "An image of %d x %d pixels comes as %d x %d, and is resized again: give the test "
                "loader augmentations=[].",
                *size,
                *pixels,
            )
        found = []
        for scale, size_range in zip(self.scales, self.ranges):
            for result, mirrored in self._views(item, scale):
                result = result[in_size_range(result.pred_boxes.tensor, size_range)]
                if mirrored:
                    result.pred_boxes = self._mirrored(result)
                found.append(detector_postprocess(result, *size))
        union = Instances.cat(found)
        boxes, scores, classes = self.merge(
            union.pred_boxes.tensor, union.scores, union.pred_classes
        )
        return Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)

    def _views(self, item: Mapping[str, Any], scale: int) -> Iterator[tuple[Instances, bool]]:
        """What the model finds at a scale, in pixels of the resized image; whether mirrored."""
        image = item["image"].permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
        transform = self.resize(scale, self.max_size).get_transform(image)
        image = np.ascontiguousarray(transform.apply_image(image).transpose(2, 0, 1))
        image = torch.from_numpy(image)
        view = {**item, "image": image, "height": image.shape[1], "width": image.shape[2]}
        views = [view]
        if self.flip:
            prompt = item.get("mirrored_prompt", item["prompt"])
            views.append({**view, "image": image.flip(-1), "prompt": prompt})
        for start in range(0, len(views), self.batch_views):
            outputs = self.model(views[start : start + self.batch_views])
            for place, output in enumerate(outputs, start=start):
                yield output["instances"], place == 1

    def _mirrored(self, result: Instances) -> Boxes:
        last = result.image_size[1] - int(self.legacy_boxes)
        x1, y1, x2, y2 = result.pred_boxes.tensor.unbind(dim=1)
        return Boxes(torch.stack([last - x2, y1, last - x1, y2], dim=1))

    @contextmanager
    def _all_candidates(self) -> Iterator[None]:
        """Lets the model's suppression and limits rest."""
        postprocessor = self.model.head.postprocessor
        settings = {
            "nms_thresh": math.inf,
            "max_detections": self.max_candidates,
            "max_merged_detections": 0,
        }
        before = {name: getattr(postprocessor, name) for name in settings}
        try:
            for name, value in settings.items():
                setattr(postprocessor, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(postprocessor, name, value)
