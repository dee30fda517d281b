"""A tiny model and data set, and the command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

CONFIG = """
import copy

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

COMMON = "{repository}/configs/common/"
model = LazyConfig.load(COMMON + "models/fiber_tiny.py", "model")
model.backbone.vision.update(
    embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window=2, fused_blocks=[0, 0, 1, 1]
)
model.backbone.text.update(
    dim=32, num_layers=2, num_heads=2, mlp_dim=64, image_dims=[64, 128], dropout={dropout}
)
model.backbone.neck.update(in_channels=[32, 64, 128], out_channels=16)
model.head.tower.update(num_blocks=1, norm_groups=4)
model.head.postprocessor.update(score_thresh=0.0)

train = LazyConfig.load(COMMON + "train.py", "train")
train.update(max_iter=6, log_period=1, eval_period=0, pictures=0, device="cpu")
train.checkpointer.period = 2
optimizer = LazyConfig.load(COMMON + "optim.py", "AdamW")
lr_multiplier = LazyConfig.load(COMMON + "optim.py", "cosine")
lr_multiplier.warmup_iters = 2

dataloader = LazyConfig.load(COMMON + "data.py", "dataloader")
dataloader.train.update(
    datasets=["shapes_detection_train", "shapes_grounding_train"],
    tokenizer="shapes",
    total_batch_size=4,
    num_workers=0,
    augmentations=[L(T.RandomFlip)(), L(T.Resize)(shape=64)],
    aspect_ratio_grouping=False,
)
dataloader.test.update(
    dataset="shapes_detection_val", num_workers=0, augmentations=[L(T.Resize)(shape=64)]
)
"""


@pytest.fixture(scope="session")
def datasets_root(tmp_path_factory):
    from fiber_d2.data.shapes import prepare_shapes

    root = tmp_path_factory.mktemp("datasets")
    prepare_shapes(root / "shapes", num_train=16, num_val=5, image_size=64)
    return root


@pytest.fixture(scope="session")
def write_config():
    """``write_config(path)``: the configuration, for fixtures that many tests share."""
    return lambda path: path.write_text(CONFIG.format(repository=REPOSITORY, dropout=0.0))


@pytest.fixture(scope="session")
def dropout_config():
    """Text of the file that ``dropout_config_file`` is, for fixtures that several tests share."""
    return CONFIG.format(repository=REPOSITORY, dropout=0.2)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(repository=REPOSITORY, dropout=0.0))
    return path


@pytest.fixture
def dropout_config_file(tmp_path, dropout_config):
    """Draws random numbers in every step."""
    path = tmp_path / "dropout_config.py"
    path.write_text(dropout_config)
    return path


@pytest.fixture
def start(tmp_path, datasets_root):
    """Start train_net.py in ``tmp_path``: ``start(*arguments, **environment) -> Popen``."""
    started = []

    def start(*arguments, **environment):
        variables = {"DETECTRON2_DATASETS": str(datasets_root), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "train_net.py"), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def run(start):
    """The same, waited for: ``(exit code, stdout, stderr)``."""

    def run(*arguments, **environment):
        process = start(*arguments, **environment)
        out, err = process.communicate(timeout=900)
        return process.returncode, out, err

    return run
