"""Rates and lengths for other batch sizes, and lengths in epochs."""

import logging

import pytest
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fiber_d2.config import add_fiber_config
from fiber_d2.engine.overrides import load_config
from fiber_d2.engine.scaling import (
    checkpoint_period,
    images_per_step,
    iterations,
    lengths_from_epochs,
    scale_to_batch_size,
)


def config(batch, *, reference=64, rule=None, accumulate=1, weights=None):
    return OmegaConf.create(
        {
            "train": {
                "max_iter": 800_000,
                "eval_period": 20_000,
                "checkpointer": {"period": 2500, "max_to_keep": 3},
                "accumulate": accumulate,
                "scaling": {"reference_batch_size": reference, "rule": rule},
                "ema": {"decay": 0.999},
            },
            "optimizer": {
                "lr": 1e-4,
                "weight_decay": 1e-2,
                "params": {"base_lr": "${..lr}", "text_lr_factor": 0.1},
            },
            "lr_multiplier": {
                "max_iter": "${train.max_iter}",
                "warmup_iters": 2000,
                "milestones": [0.67, 700_000],
            },
            "dataloader": {"train": {"total_batch_size": batch, "weights": weights}},
        }
    )


def solver(batch, rule="linear"):
    cfg = get_cfg()
    add_fiber_config(cfg)
    cfg.SOLVER.update(
        IMS_PER_BATCH=batch,
        BASE_LR=1e-4,
        MAX_ITER=800_000,
        WARMUP_ITERS=2000,
        STEPS=(536_000, 712_000),
        CHECKPOINT_PERIOD=2500,
    )
    cfg.FIBER.TRAIN.SCALING.update(REFERENCE_BATCH_SIZE=64, RULE=rule)
    cfg.freeze()
    return cfg


def test_linear_rule():
    cfg = config(16, rule="linear")
    scale_to_batch_size(cfg)
    assert cfg.optimizer.lr == cfg.optimizer.params.base_lr == 2.5e-5
    assert cfg.optimizer.params.text_lr_factor == 0.1
    assert cfg.train.max_iter == cfg.lr_multiplier.max_iter == 3_200_000
    assert cfg.train.eval_period == 80_000
    assert cfg.train.checkpointer == {"period": 10_000, "max_to_keep": 3}
    assert cfg.lr_multiplier.warmup_iters == 8000
    assert cfg.lr_multiplier.milestones == [0.67, 2_800_000]
    assert (cfg.optimizer.weight_decay, cfg.train.ema.decay) == (1e-2, 0.999)


def test_epochs_stay():
    cfg = config(16, rule="linear")
    cfg.train.epochs = 12
    assert set(scale_to_batch_size(cfg)) == {
        "optimizer.lr",
        "lr_multiplier.warmup_iters",
        "lr_multiplier.milestones",
    }
    assert cfg.train.max_iter == 800_000, "which epochs replace"


def test_sqrt_rule_differs_in_rates_only():
    linear, sqrt = config(16, rule="linear"), config(16, rule="sqrt")
    for cfg in (linear, sqrt):
        scale_to_batch_size(cfg)
    assert sqrt.optimizer.lr == 5e-5
    sqrt.optimizer.lr = linear.optimizer.lr
    assert sqrt == linear


def test_what_changed_is_logged_and_told(caplog):
    with caplog.at_level(logging.INFO):
        changes = scale_to_batch_size(config(128, rule="linear"))
    assert changes["optimizer.lr"] == (1e-4, 2e-4)
    assert set(changes) == {
        "optimizer.lr",
        "train.max_iter",
        "train.eval_period",
        "train.checkpointer.period",
        "lr_multiplier.warmup_iters",
        "lr_multiplier.milestones",
    }
    assert "128 images per step instead of 64, rule linear" in caplog.text
    assert "optimizer.lr 0.0001 -> 0.0002" in caplog.text
    assert "train.max_iter 800000 -> 400000" in caplog.text


@pytest.mark.parametrize(("batch", "accumulate"), [(64, 1), (16, 4), (1, 64)])
def test_accumulated_batches_count(batch, accumulate, caplog):
    cfg = config(batch, accumulate=accumulate, rule="linear")
    before = cfg.copy()
    assert images_per_step(cfg) == 64
    assert scale_to_batch_size(cfg) == {}
    assert cfg == before and not caplog.records


def test_nothing_is_changed_silently(caplog):
    cfg = config(16)
    before = cfg.copy()
    assert scale_to_batch_size(cfg) == {}
    assert cfg == before
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "16 images" in record.message and "those of 64" in record.message
    assert "train.scaling.rule=linear or sqrt would adapt them" in record.message


def test_twice_is_once():
    cfg = config(16, rule="linear")
    scale_to_batch_size(cfg)
    once = cfg.copy()
    assert scale_to_batch_size(cfg) == {}
    assert cfg == once
    assert cfg.train.scaling == {"reference_batch_size": 16, "rule": None}


def test_a_recipe_of_no_particular_batch_size(caplog):
    assert scale_to_batch_size(config(16, reference=None)) == {}
    assert not caplog.records
    with pytest.raises(ValueError, match="give the reference_batch_size"):
        scale_to_batch_size(config(16, reference=None, rule="linear"))
    with pytest.raises(ValueError, match="'cubic' is not known; it may be linear, sqrt"):
        scale_to_batch_size(config(16, rule="cubic"))


def test_changes_of_mixing_weights_stay_at_the_same_image():
    # They count batches of the loader.
    cfg = config(8, accumulate=2, rule="linear", weights={0: [1, 1], 500: [1, 3]})
    scale_to_batch_size(cfg)
    assert cfg.dataloader.train.weights == {0: [1, 1], 4000: [1, 3]}
    fixed = config(8, rule="linear", weights=[1, 2])
    scale_to_batch_size(fixed)
    assert fixed.dataloader.train.weights == [1, 2]


@given(batch=st.integers(1, 4096))
def test_training_sees_as_many_images(batch):
    cfg = config(batch, rule="sqrt")
    scale_to_batch_size(cfg)
    assert abs(cfg.train.max_iter * batch - 800_000 * 64) <= batch / 2
    assert cfg.optimizer.lr == pytest.approx(1e-4 * (batch / 64) ** 0.5)


def test_solver():
    cfg = solver(16)
    scale_to_batch_size(cfg)
    assert cfg.SOLVER.BASE_LR == 2.5e-5
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS) == (3_200_000, 8000)
    assert cfg.SOLVER.STEPS == (2_144_000, 2_848_000)
    # Evaluation only at the end, which is 0, stays.
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (10_000, 0)
    assert cfg.is_frozen()
    again = cfg.clone()
    assert scale_to_batch_size(cfg) == {} and cfg == again


def test_solver_without_a_rule(caplog):
    assert scale_to_batch_size(solver(16, rule="")) == {}
    assert "FIBER.TRAIN.SCALING.RULE=linear or sqrt" in caplog.text


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "expected"),
    [
        # SPEC_DATA_EVAL 5.12: floor(epochs * images / batch).
        (24, 117_266, 32, 87_949),
        (20, 120_191, 16, 150_238),
        (200, 448, 4, 22_400),
        (1, 3, 4, 1),
    ],
)
def test_iterations(epochs, images, batch, expected):
    assert iterations(epochs=epochs, num_images=images, batch_size=batch) == expected


def test_no_iterations():
    with pytest.raises(ValueError, match="0 epochs of 5 images"):
        iterations(epochs=0, num_images=5, batch_size=1)


@given(max_iter=st.integers(1, 10**7), eval_period=st.integers(1, 10**5))
def test_at_most_twenty_checkpoints(max_iter, eval_period):
    period = checkpoint_period(max_iter, eval_period)
    assert period % eval_period == 0
    assert max_iter // period <= 20
    assert period == eval_period or max_iter > (period - eval_period) * 20


@pytest.fixture
def epochs_config(config_file, datasets_root, monkeypatch):
    from fiber_d2.data import register_all_builtin

    register_all_builtin(str(datasets_root))
    yield lambda *overrides: load_config(str(config_file), list(overrides))
    register_all_builtin()


def test_lengths_from_epochs(epochs_config):
    # 16 images for each of the two tasks; the captions are two per image or more.
    plain = epochs_config("train.epochs=null")
    lengths_from_epochs(plain)
    assert plain.train.max_iter == 6
    one = ["dataloader.train.datasets=[shapes_detection_train]", "train.epochs=10"]
    cfg = epochs_config(*one, "train.eval_epochs=2")
    lengths_from_epochs(cfg)
    assert (cfg.train.max_iter, cfg.train.eval_period, cfg.train.checkpointer.period) == (40, 8, 8)
    cfg = epochs_config(*one, "train.epochs=110", "train.eval_epochs=1")
    lengths_from_epochs(cfg)
    # 440 steps, 22 of them for a twentieth, in whole epochs of 4.
    assert (cfg.train.eval_period, cfg.train.checkpointer.period) == (4, 24)
    cfg = epochs_config(*one, "dataloader.train.repeats=[3]", "train.accumulate=2")
    lengths_from_epochs(cfg)
    assert (cfg.train.max_iter, cfg.train.eval_period) == (60, 0)
    few = epochs_config(*one, "dataloader.train.few_shot=1", "dataloader.train.total_batch_size=1")
    lengths_from_epochs(few)
    assert 0 < few.train.max_iter < 160


def test_epochs_that_are_not_defined(epochs_config):
    with pytest.raises(ValueError, match="train.eval_epochs needs train.epochs"):
        lengths_from_epochs(epochs_config("train.eval_epochs=2"))
    weighted = ["train.epochs=2", "dataloader.train.weights=[1,2]"]
    with pytest.raises(ValueError, match="goes through its images in passes"):
        lengths_from_epochs(epochs_config(*weighted))
