"""What the recipes of pre-training share, and with other numbers those of fine-tuning.

FIBER-B in the original's optimisation: AdamW with one rate for images and head and a tenth of it
for words, gradients clipped at norm 1, drop path 0.4, mixed precision, averaged weights.
"""

from .data import dataloader as _loaders
from .eval import dataloader, model, protocol, train  # noqa: F401
from .optim import AdamW as optimizer
from .optim import multistep as lr_multiplier  # noqa: F401

# As published, the patch embedding and the first stage of the image tower do not learn.
model.backbone.vision.frozen_stages = 2
model.backbone.vision.drop_path = 0.4
# Less memory, the same numbers. The image tower does without, at one image per 32 GB GPU.
model.backbone.vision.checkpoint = False
model.backbone.text.checkpoint = False
model.head.tower.checkpoint = True

dataloader.train = _loaders.train
dataloader.train.update(
    total_batch_size=64,
    tokenizer="${protocol.tokenizer}",
    max_tokens="${protocol.max_tokens}",
    separator="${protocol.separator}",
    dataset_prompts="${protocol.dataset_prompts}",
    aspect_ratio_grouping=True,
    # Objects365: the classes of the image, and 85 others in half of the captions, none or one in
    # a tenth, any number in the rest. The fourth of the published probabilities has no effect.
    sampled_classes=dict(num_negatives=85, control_probabilities=[0.05, 0.05, 0.5, 0.2]),
    # Captions of real data: a phrase without words keeps its box, a long caption loses its end.
    on_empty="keep",
    on_overflow="truncate",
)

optimizer.lr = 1e-4
optimizer.weight_decay = 1e-2
optimizer.params.text_lr_factor = 0.1

# Falls before the rate does: at 66.7 % of its milestones.
train.weight_decay_schedule = dict(
    milestones="${lr_multiplier.milestones}", ratio=0.667, gamma="${lr_multiplier.gamma}"
)

train.max_iter = 800_000
train.amp.enabled = True
train.clip_grad = 1.0
train.ema = dict(decay=0.999)
train.scaling.reference_batch_size = 64
train.checkpointer.update(period=2500, max_to_keep=3)
train.eval_period = 20_000
train.output_dir = "output/pretrain"

dataloader.test.dataset = "coco_grounding_val"
