"""The quickstart: a small FIBER learns detection, grounding and referring expressions on the CPU.

    python train_net.py --config-file configs/quickstart.py

The data are generated (`shapes`), so nothing is downloaded. 128-pixel images, batches of 16.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from fiber_d2.data import build_test_loader
from fiber_d2.data.shapes import prepare_shapes
from fiber_d2.engine.report import final_report

from .common.data import dataloader
from .common.models.fiber_tiny import model
from .common.optim import AdamW_by_kind as optimizer
from .common.optim import cosine as lr_multiplier
from .common.train import train

SIZE = 128

# Generated once; the marker in the folder remembers with which parameters.
prepare = L(prepare_shapes)(
    root="${oc.env:DETECTRON2_DATASETS,datasets}/shapes",
    seed=0,
    num_train=4000,
    num_val=300,
    image_size=SIZE,
    shapes=["circle", "triangle", "cross"],
    # Over the image's side: small shapes of 20 to 29 pixels, large ones of 41 to 58.
    small=[0.16, 0.23],
    large=[0.32, 0.45],
    relations_per_image=12,
    # Expressions by colour, shape and size are learned from the other tasks, too.
    train_relation_share=0.9,
)

# Windows of 4 x 4 tokens see parts of shapes in the first stages and everything in the last one.
model.backbone.vision.window = 4
# Half as wide as usual between the layers: more steps in the same time.
model.backbone.vision.mlp_ratio = 2.0
model.backbone.vision.query_norm = True
# From scratch, words that do not outweigh what they have in common become alike before they are
# told apart: "left" and "right" then stay one word for as long as luck will have it. Places come
# next: by them a phrase keeps its words from its neighbours'.
model.backbone.text.word_init_std = 0.16
model.backbone.text.position_init_std = 0.08
# AdamW moves weights by its rate: boxes start at the size that they have to reach.
model.head.box_scale_init = 8.0

# Referring expressions are scored among all boxes, however weak, as the original does.
model.head.postprocessor.score_thresh = 0.0

train.output_dir = "output/quickstart"
train.device = "cuda"
train.max_iter = 1590
train.eval_period = 0
train.checkpointer.update(period=200, max_to_keep=2)
train.clip_grad = 1.0

optimizer.lr = 1e-3
optimizer.weight_decay = 0.05
optimizer.betas = (0.9, 0.95)
optimizer.fused = True
# Post-norm text layers that train from scratch at the full rate make all words alike.
optimizer.params.text_lr_factor = 0.3
lr_multiplier.warmup_iters = 50

dataloader.train.update(
    datasets=["shapes_detection_train", "shapes_grounding_train", "shapes_refexp_train"],
    # How the three tasks share the batches, by the step from which on they do. Relations need many
    # examples until they are learned, sentences need the most steps.
    weights={0: [0.28, 0.24, 0.48], 600: [0.39, 0.56, 0.05]},
    # One list in one order is learned by its places; then half of its names would mean nothing.
    sampled_classes=dict(control_probabilities=[0.1, 0.05, 0.5]),
    tokenizer="shapes",
    augmentations=[
        L(T.RandomFlip)(horizontal=True),
        L(T.ResizeShortestEdge)(short_edge_length=SIZE, max_size=SIZE),
    ],
    total_batch_size=16,
    num_workers=1,
    aspect_ratio_grouping=False,
)
dataloader.test = [
    L(build_test_loader)(
        dataset=dataset,
        tokenizer="${...train.tokenizer}",
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=SIZE, max_size=SIZE)],
        batch_size=32,
        num_workers=1,
    )
    for dataset in ("shapes_detection_val", "shapes_grounding_val", "shapes_refexp_val")
]

report = L(final_report)(
    metrics={
        "detection/AP": ("shapes_detection_val", "bbox/AP"),
        "detection/AP50": ("shapes_detection_val", "bbox/AP50"),
        "grounding/R@1": ("shapes_grounding_val", "grounding/R@1"),
        "refexp/P@1": ("shapes_refexp_val", "refexp/shapes_attribute/P@1"),
        "refexp_relation/P@1": ("shapes_refexp_val", "refexp/shapes_relation/P@1"),
    },
    next_steps=[
        "look at the pictures, contact_sheet.png first",
        "point configs/finetune/custom_coco.py at your own COCO json and photographs",
    ],
)
