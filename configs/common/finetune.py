"""What the recipes of fine-tuning on large data sets share: where they depart from pre-training.

All of the model learns, more gently: a rate of 1e-5 for all parts, constant weight decay, no
clipping. `train.init_checkpoint` has to be given: the result of pre-training.
"""

from .pretrain import dataloader, lr_multiplier, model, optimizer, protocol, train  # noqa: F401

model.backbone.vision.frozen_stages = -1
model.backbone.vision.checkpoint = True

optimizer.lr = 1e-5
optimizer.weight_decay = 1e-4
optimizer.params.text_lr_factor = 1.0

train.weight_decay_schedule = None

train.clip_grad = None
