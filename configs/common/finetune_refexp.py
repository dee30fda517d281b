"""What fine-tuning on RefCOCO, RefCOCO+ and RefCOCOg shares: fusion v3, images never mirrored."""

from detectron2.config import LazyCall as L

from fiber_d2.data import ResizeShortestEdgeTruncated

from .finetune import dataloader, lr_multiplier, model, optimizer, protocol, train  # noqa: F401

model.backbone.vision.query_norm = True
# As in configs/eval: however weak, a box is better than none.
model.head.postprocessor.update(score_thresh=0.0, pre_nms_topk=3000)

dataloader.train.total_batch_size = 16
dataloader.train.augmentations = [
    L(ResizeShortestEdgeTruncated)(
        short_edge_length=[480, 560, 640, 720, 800], max_size=1333, sample_style="choice"
    )
]
# Expressions are short and always of words: what does not fit is a mistake in the file.
dataloader.train.update(on_empty="error", on_overflow="error", sampled_classes=None)

train.scaling.reference_batch_size = 16
train.eval_period = 2500
