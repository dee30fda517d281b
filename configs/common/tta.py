"""Multi-scale test-time augmentation, the original's settings; see fiber_d2.modeling.FiberWithTTA.

An evaluation config turns it on with

    train.tta = tta
    dataloader.test.augmentations = []
"""

from detectron2.config import LazyCall as L

from fiber_d2.data import ResizeShortestEdgeTruncated
from fiber_d2.modeling.test_time_augmentation import RANGES, SCALES, FiberWithTTA

# The evaluation adds the model, with its weights loaded.
tta = L(FiberWithTTA)(
    scales=SCALES,
    max_size=2500,
    flip=True,
    # One (least, greatest) box size per scale, in the resized image; None takes all boxes.
    ranges=RANGES,
    resize=ResizeShortestEdgeTruncated,
    # "nms", "soft-nms", "vote" or "soft-vote".
    method="nms",
    threshold=0.6,
    max_detections=1000,
)
