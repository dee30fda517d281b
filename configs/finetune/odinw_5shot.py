"""Fine-tuning on one of ODinW's 35 sets, five images per class.

    train_net.py --config-file configs/finetune/odinw_5shot.py --num-gpus 4 \
        train.init_checkpoint=PRETRAINED.pth data.name=Aquarium data.seed=3

4 images per step; an epoch shows the chosen images twice, and there are at most 200: with K
images K/2 steps per epoch, 100K in all.
Other than that as odinw_full.py. fiber_d2.engine.fewshot runs several sets, shots and seeds, tests
each once and makes the table.
"""

from .odinw_1shot import (  # noqa: F401
    data,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    protocol,
    train,
)

# odinw_${data.name}_train_shot5_seed3 (or 30, 300), with few_shot=0, are the published choices.
dataloader.train.update(few_shot=5, repeats=[2])
train.output_dir = "output/odinw/${data.name}/5shot_seed${data.seed}"
