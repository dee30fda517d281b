"""What fine-tuning on the sets of ODinW shares: pre-training's rates until the validation stalls.

The set is a field, `data.name`. The length is counted in epochs, since the sets differ in size.
"""

# Times 0.1 when the fourth validation in a row has brought nothing.
from .optim import plateau as lr_multiplier  # noqa: F401
from .pretrain import dataloader, model, optimizer, protocol, train  # noqa: F401

data = dict(
    # One of the 35, as in datasets/README.md.
    name="Aquarium",
    # What chooses the best checkpoint: "val", or "minival" for the sets that have one.
    validation="val",
)

dataloader.train.update(
    datasets=["odinw_${data.name}_train"],
    total_batch_size=4,
    # All classes of the set, always in the same order.
    sampled_classes=None,
    shuffle_classes=False,
    # Sets are small, and batches of one orientation leave images over.
    aspect_ratio_grouping=False,
)
dataloader.test.dataset = "odinw_${data.name}_${data.validation}"

optimizer.weight_decay = 0.05
train.weight_decay_schedule = None

train.tuning = "full"
train.ema = None
train.scaling.reference_batch_size = 4
# One validation per epoch; at most 200 epochs.
train.epochs = 200
train.eval_epochs = 1
train.best = dict(metric="${dataloader.test.dataset}/bbox/AP", mode="max")
train.early_stop = dict(patience=8)
train.test_best = ["odinw_${data.name}_test"]
train.checkpointer.max_to_keep = 1
train.output_dir = "output/odinw/${data.name}"
