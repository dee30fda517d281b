"""Loaders of data sets in the catalogue; a recipe names the sets and their sizes."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf

from fiber_d2.data import ResizeShortestEdgeTruncated, build_test_loader, build_train_loader
from fiber_d2.evaluation import build_evaluator

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    datasets=[],
    tokenizer="roberta-base",
    augmentations=[
        L(T.RandomFlip)(horizontal=True),
        L(ResizeShortestEdgeTruncated)(
            short_edge_length=[480, 560, 640, 720, 800], max_size=1333, sample_style="choice"
        ),
    ],
    total_batch_size=16,
    num_workers=4,
    seed="${train.seed}",
    aspect_ratio_grouping=True,
)

# One node, or a list of them with a `dataset` each.
dataloader.test = L(build_test_loader)(
    dataset="???",
    tokenizer="${dataloader.train.tokenizer}",
    augmentations=[L(ResizeShortestEdgeTruncated)(short_edge_length=800, max_size=1333)],
    num_workers=4,
)

# Made once for each test set, whose name the evaluation fills in.
dataloader.evaluator = L(build_evaluator)(output_dir="${train.output_dir}/inference")
