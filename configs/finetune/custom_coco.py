"""Fine-tune on your own COCO-format data: edit the three paths, or give them as overrides.

    python train_net.py --config-file configs/finetune/custom_coco.py \
        data.train_json=T.json data.val_json=V.json data.image_root=IMAGES

Class names and ids are read from the files. As written it starts from the quickstart's small
model; 450 iterations of 8 images are 24 epochs over 150 images.
"""

from detectron2.config import LazyCall as L

from fiber_d2.data import register_coco_json

from ..quickstart import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

data = dict(
    train_json="datasets/custom/train.json",
    val_json="datasets/custom/val.json",
    image_root="datasets/custom/images",
)

# Called in every process before the data sets are used.
register = dict(
    train=L(register_coco_json)(
        name="custom_train", json_file="${data.train_json}", image_root="${data.image_root}"
    ),
    val=L(register_coco_json)(
        name="custom_val", json_file="${data.val_json}", image_root="${data.image_root}"
    ),
)

train.output_dir = "output/custom_coco"
train.init_checkpoint = "output/quickstart/model_final.pth"
train.max_iter = 450
train.eval_period = 0

dataloader.train.datasets = ["custom_train"]
dataloader.train.weights = None
# All classes in each caption; {} draws some, for more classes than a caption holds.
dataloader.train.sampled_classes = None
dataloader.train.total_batch_size = 8
dataloader.train.augmentations[1].update(
    short_edge_length=[192, 224, 256], max_size=384, sample_style="choice"
)
dataloader.test = dataloader.test[:1]
dataloader.test[0].update(dataset="custom_val", batch_size=4)
dataloader.test[0].augmentations[0].update(short_edge_length=224, max_size=384)

optimizer.lr = 5e-4
lr_multiplier.warmup_iters = 50
