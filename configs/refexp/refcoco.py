"""Fine-tuning on RefCOCO.

Published P@1, by generalised IoU: 90.68 (val), 92.59 (testA), 87.26 (testB).

    train_net.py --config-file configs/refexp/refcoco.py --num-gpus 16 \
        train.init_checkpoint=PRETRAINED.pth

16 expressions per step, one on each of 16 GPUs. There are 120,624 to learn from:
20 epochs x 120,624 / 16 = 150,780 steps. The rate drops at 67 % and 89 %.

From fusion v3, pre-trained without the images to be tested on
(configs/pretrain/mixed_flickr_objects365_refexpclean.py). Tests: configs/eval/refcoco_*.py.
Data: mdetr_annotations/finetune_refcoco_{train,val}.json, coco/train2014/.
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

dataloader.train.datasets = ["refcoco_train"]
dataloader.test.dataset = "refcoco_val"

train.max_iter = iterations(epochs=20, num_images=120_624, batch_size=16)
train.output_dir = "output/refexp/refcoco"
