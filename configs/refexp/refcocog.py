"""Fine-tuning on RefCOCOg.

Published P@1, by generalised IoU: 87.11 (val), 87.32 (test).

    train_net.py --config-file configs/refexp/refcocog.py --num-gpus 16 \
        train.init_checkpoint=PRETRAINED.pth

16 expressions per step, one on each of 16 GPUs. There are 80,512 to learn from:
20 epochs x 80,512 / 16 = 100,640 steps. The rate drops at 67 % and 89 %.

From fusion v3, pre-trained without the images to be tested on
(configs/pretrain/mixed_flickr_objects365_refexpclean.py). Tests: configs/eval/refcocog_*.py.
Data: mdetr_annotations/finetune_refcocog_{train,val}.json, coco/train2014/.
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

dataloader.train.datasets = ["refcocog_train"]
dataloader.test.dataset = "refcocog_val"

train.max_iter = iterations(epochs=20, num_images=80_512, batch_size=16)
train.output_dir = "output/refexp/refcocog"
