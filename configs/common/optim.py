"""Optimiser and learning-rate schedule; a recipe sets rates and lengths."""

import torch
from detectron2.config import LazyCall as L

from fiber_d2.engine.optimizer import get_param_groups, published_param_groups
from fiber_d2.engine.schedules import (
    PlateauSchedule,
    PublishedCosine,
    warmup_cosine,
    warmup_multistep,
)

# The optimiser's `params` still lack the model, which the trainer adds.
# Rates and decays by the rules of the published runs: a parameter with "bias" in its name learns
# twice as fast and does not decay, and weights of norms do decay.
_published = L(published_param_groups)(
    base_lr="${..lr}",
    weight_decay="${..weight_decay}",
    text_lr_factor=1.0,
    vision_lr_factor=1.0,
    bias_lr_factor=2.0,
    weight_decay_bias=0.0,
    weight_decay_norm_factor=1.0,
)

AdamW = L(torch.optim.AdamW)(params=_published, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4)

SGD = L(torch.optim.SGD)(params=_published, lr=1e-2, momentum=0.9, weight_decay=1e-4)

# The same, by what parameters are: biases learn at the rate of their tower.
AdamW_by_kind = L(torch.optim.AdamW)(
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

# The rate's factor falls to 0 at the end of the run.
cosine = L(warmup_cosine)(max_iter="${train.max_iter}", warmup_iters=1000, warmup_factor=1e-3)

# The published runs'.
multistep = L(warmup_multistep)(
    max_iter="${train.max_iter}",
    warmup_iters=2000,
    warmup_factor=1e-3,
    milestones=[0.67, 0.89],
    gamma=0.1,
)

# The original's alternatives: a cosine that stops short of its floor, and drops when the metric of
# train.best has not risen for more than `patience` evaluations (which needs train.best).
published_cosine = L(PublishedCosine)(
    max_iter="${train.max_iter}", warmup_iters=2000, warmup_factor=1e-3, min_lr=1e-6
)

plateau = L(PlateauSchedule)(gamma=0.1, patience=3, min_lr=1e-6, mode="max", warmup_iters=0)
