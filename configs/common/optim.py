"""Optimiser and learning-rate schedule; a recipe sets rates and lengths."""

import torch
from detectron2.config import LazyCall as L

from fiber_d2.engine.optimizer import get_param_groups, warmup_cosine, warmup_multistep

# The optimiser's `params` still lack the model, which the trainer adds.
AdamW = L(torch.optim.AdamW)(
    params=L(get_param_groups)(
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        text_lr_factor=1.0,
        vision_lr_factor=1.0,
        weight_decay_bias=0.0,
    ),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
)

cosine = L(warmup_cosine)(max_iter="${train.max_iter}", warmup_iters=1000, warmup_factor=1e-3)

multistep = L(warmup_multistep)(
    max_iter="${train.max_iter}",
    warmup_iters=2000,
    warmup_factor=1e-3,
    milestones=[0.67, 0.89],
    gamma=0.1,
)
