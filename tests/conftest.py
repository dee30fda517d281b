"""What all tests need."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def hear_ctrl_c():
    """Shells start background jobs deaf to SIGINT, and so would be what the tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def loggers_stay():
    """Runs inside of a test set up loggers for their files; the next test finds them as before."""
    loggers = [logging.getLogger(name) for name in ("fiber_d2", "detectron2", "fvcore")]
    before = [(log.level, log.propagate, list(log.handlers)) for log in loggers]
    yield
    for log, (level, propagate, handlers) in zip(loggers, before):
        log.setLevel(level)
        log.propagate, log.handlers = propagate, handlers


TINY_CONFIG = """
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

COMMON = "{configs}/common/"
model = LazyConfig.load(COMMON + "models/fiber_tiny.py", "model")
model.backbone.vision.update(
    embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window=2, fused_blocks=[0, 0, 1, 1]
)
model.backbone.text.update(dim=32, num_layers=2, num_heads=2, mlp_dim=64, image_dims=[64, 128])
model.backbone.neck.update(in_channels=[32, 64, 128], out_channels=16)
model.head.tower.update(num_blocks=1, norm_groups=4)
model.head.postprocessor.update(score_thresh=0.0, max_detections=20)
train = LazyConfig.load(COMMON + "train.py", "train")
dataloader = LazyConfig.load(COMMON + "data.py", "dataloader")
dataloader.test.update(
    tokenizer="shapes",
    num_workers=0,
    max_tokens=24,
    augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64, max_size=96)],
)
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model with random weights and two photographs: ``config``, ``weights``, ``images``."""
    from types import SimpleNamespace

    import numpy as np
    import torch
    from detectron2.config import LazyConfig, instantiate
    from PIL import Image

    folder = tmp_path_factory.mktemp("tiny")
    config, weights = folder / "config.py", folder / "model.pth"
    config.write_text(TINY_CONFIG.format(configs=Path(__file__).parents[1] / "configs"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = instantiate(LazyConfig.load(str(config)).model)
        # Words far apart, so that what is asked for shows in the result.
        torch.nn.init.normal_(model.head.text_projection.weight)
    torch.save({"model": model.state_dict()}, weights)
    random = np.random.default_rng(0)
    images = []
    for number, size in enumerate([(80, 70), (60, 90)]):
        coarse = Image.fromarray(random.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        images.append(folder / "images" / f"{number}.png")
        images[-1].parent.mkdir(exist_ok=True)
        coarse.resize(size, Image.Resampling.BICUBIC).save(images[-1])
    return SimpleNamespace(config=config, weights=weights, images=images)
