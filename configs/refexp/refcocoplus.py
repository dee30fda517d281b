"""Fine-tuning on RefCOCO+.

Published P@1, by generalised IoU: 85.74 (val), 90.13 (testA), 79.38 (testB).

    train_net.py --config-file configs/refexp/refcocoplus.py --num-gpus 16 \
        train.init_checkpoint=PRETRAINED.pth

16 expressions per step, one on each of 16 GPUs. There are 120,191 to learn from:
20 epochs x 120,191 / 16 = 150,238 steps. The rate drops at 67 % and 89 %.

From fusion v3, pre-trained without the images to be tested on
(configs/pretrain/mixed_flickr_objects365_refexpclean.py). Tests: configs/eval/refcocoplus_*.py.
Data: mdetr_annotations/finetune_refcoco+_{train,val}.json, coco/train2014/.
"""

from fiber_d2.engine.scaling import iterations

from ..common.finetune_refexp import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    protocol,
    train,
)

dataloader.train.datasets = ["refcoco+_train"]
dataloader.test.dataset = "refcoco+_val"

train.max_iter = iterations(epochs=20, num_images=120_191, batch_size=16)
train.output_dir = "output/refexp/refcocoplus"
