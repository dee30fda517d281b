"""Pre-training for referring expressions: fusion v3, and no image that RefCOCO/+/g test on.

    train_net.py --config-file configs/pretrain/mixed_flickr_objects365_refexpclean.py \
        --num-gpus 16 --num-machines 4 --machine-rank RANK --dist-url tcp://HOST:PORT \
        train.init_checkpoint=START.pth

64 images per step, 800,000 steps: 51.2 million images, as in mixed_flickr_objects365.py. It
differs by the fusion, by a warm-up of 5000 steps, and by the annotation file:
final_mixed_train_no_coco_refexpclean.json, which datasets/prepare/refexp_clean.py makes.

The start of configs/refexp.
"""

from .mixed_flickr_objects365 import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    protocol,
    train,
)

model.backbone.vision.query_norm = True
lr_multiplier.warmup_iters = 5000
dataloader.train.datasets[0] = "mixed_train_no_coco_refexpclean"
train.output_dir = "output/pretrain/mixed_flickr_objects365_refexpclean"
