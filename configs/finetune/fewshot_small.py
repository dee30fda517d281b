"""The few-shot protocol with the quickstart's small model, which a CPU can do.

    python -m fiber_d2.engine.fewshot --config-file configs/finetune/fewshot_small.py \
        --dataset mine --train-json T.json --val-json V.json --image-root IMAGES

Data sets, lengths and seeds are set by the program; as it stands this trains on the generated
shapes. The optimisation is ODinW's: the rate drops when the validation no longer improves, and
training stops when it has been below its best eight times in a row. Images have 224 pixels.
"""

from ..common.optim import plateau as lr_multiplier  # noqa: F401
from ..quickstart import dataloader, model, optimizer, train  # noqa: F401

SIZE = 224

train.output_dir = "output/fewshot_small"
train.init_checkpoint = "output/quickstart/model_final.pth"
train.best = dict(metric="${dataloader.test.dataset}/bbox/AP", mode="max")
train.early_stop = dict(patience=8)

dataloader.train.update(
    datasets=["shapes_detection_train"],
    weights=None,
    sampled_classes=None,
    total_batch_size=4,
)
dataloader.train.augmentations[1].update(
    short_edge_length=[192, 224, 256], max_size=384, sample_style="choice"
)
dataloader.test = dataloader.test[0]
dataloader.test.update(tokenizer="${dataloader.train.tokenizer}", batch_size=4)
dataloader.test.augmentations[0].update(short_edge_length=SIZE, max_size=384)

optimizer.lr = 5e-4
