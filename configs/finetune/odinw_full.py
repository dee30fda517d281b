"""Fine-tuning on one of ODinW's 35 sets, all of its images. Published mean of the 13: 65.9 AP.

    train_net.py --config-file configs/finetune/odinw_full.py --num-gpus 4 \
        train.init_checkpoint=PRETRAINED.pth data.name=Aquarium

4 images per step, one on each of 4 GPUs; at most 200 epochs. Aquarium has 448 images to train on:
112 steps per epoch, 22,400 in all. After each epoch the validation split is evaluated: the rate
drops to a tenth when AP has not risen four times in a row, and training stops when it has stayed
below its best eight times in a row. Then the best checkpoint is tested, once: best.json.

Rates are pre-training's; `train.tuning` says what learns (configs/README.md). Captions hold all the
classes, in the words published with the set where there are such. From fusion v2.
Data: odinw/, see datasets/README.md.
A set whose names do not fit a caption (the program says so) can show as many as do:
dataloader.train.sampled_classes={control_probabilities:[0,0,1]}
"""

from ..common.finetune_odinw import (  # noqa: F401
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    protocol,
    train,
)

train.output_dir = "output/odinw/${data.name}/full"
