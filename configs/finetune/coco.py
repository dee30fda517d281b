"""Fine-tuning on COCO train2017. Published: 58.4 AP on val2017.

    train_net.py --config-file configs/finetune/coco.py --num-gpus 16 \
        train.init_checkpoint=PRETRAINED.pth

32 images per step, two on each of 16 GPUs. 117,266 images of train2017 have a box:
24 epochs x 117,266 / 32 = 87,949 steps. The rate drops at 67 % and 89 %.

Captions hold all 80 names, in a new order for each image. From fusion v2.
Data: coco/annotations/instances_{train,val}2017.json, coco/{train,val}2017/.
"""

from fiber_d2.engine.scaling import iterations

from ..common.finetune import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    protocol,
    train,
)

dataloader.train.update(
    datasets=["coco_grounding_train"],
    total_batch_size=32,
    sampled_classes=None,
    shuffle_classes=True,
)

train.scaling.reference_batch_size = 32
train.max_iter = iterations(epochs=24, num_images=117_266, batch_size=32)
train.eval_period = iterations(epochs=1, num_images=117_266, batch_size=32)
train.output_dir = "output/finetune/coco"
