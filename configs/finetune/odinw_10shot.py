"""Fine-tuning on one of ODinW's 35 sets, ten images per class.

    train_net.py --config-file configs/finetune/odinw_10shot.py --num-gpus 4 \
        train.init_checkpoint=PRETRAINED.pth data.name=Aquarium data.seed=3

4 images per step; an epoch shows the chosen images once, and there are at most 200: with K
images K/4 steps per epoch, 50K in all.
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

# odinw_${data.name}_train_shot10_seed3 (or 30, 300), with few_shot=0, are the published choices.
dataloader.train.update(few_shot=10, repeats=[1])
train.output_dir = "output/odinw/${data.name}/10shot_seed${data.seed}"
