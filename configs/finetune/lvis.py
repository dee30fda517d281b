"""Fine-tuning on LVIS v1 train. Published: 56.9 FixedAP on minival.

    train_net.py --config-file configs/finetune/lvis.py --num-gpus 16 \
        train.init_checkpoint=PRETRAINED.pth

32 images per step, two on each of 16 GPUs. The file has 100,170 images:
24 epochs x 100,170 / 32 = 75,127 steps. (Images without a box are left out, so it is a little more
than 24 epochs of the others.) The rate drops at 67 % and 89 %.

Captions name the classes of the image and 85 others, as many as fit. From fusion v2. Evaluated
once, at the end, by the protocol of configs/eval/lvis_minival.py.
Data: lvis/lvis_v1_train.json, lvis/lvis_v1_minival_inserted_image_name.json, coco/{train,val}2017/.
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
    datasets=["lvis_grounding_train"],
    total_batch_size=32,
    sampled_classes=dict(num_negatives=85, control_probabilities=[0.0, 0.0, 1.0]),
)

dataloader.test.dataset = "lvis_evaluation_mini_val"
protocol.max_classes = 40
model.head.postprocessor.max_detections = 300

train.scaling.reference_batch_size = 32
train.max_iter = iterations(epochs=24, num_images=100_170, batch_size=32)
train.eval_period = 0
train.output_dir = "output/finetune/lvis"
