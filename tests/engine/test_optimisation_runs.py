"""Averages, plateau and falling weight decay in whole runs of train_net.py."""

import json
import shutil

import pytest
import torch

from fiber_d2.data.builtin import register_all_builtin
from fiber_d2.engine.main import main

pytestmark = pytest.mark.slow

LAZY = """
train.update(
    max_iter=8, eval_period=2, start_check=False, checkpointer=dict(period=1, max_to_keep=None),
    ema=dict(decay=0.5), weights="ema",
    best=dict(metric="shapes_detection_val/bbox/AP", mode="max"),
    weight_decay_schedule=dict(milestones=[0.5, 0.75], ratio=0.5, gamma=0.1),
)
lr_multiplier = LazyConfig.load(COMMON + "optim.py", "plateau")
lr_multiplier.update(patience=0, warmup_iters=2)
optimizer.params.bias_lr_factor = 2.0
"""

YAML = """
MODEL:
  META_ARCHITECTURE: "FIBER"
  DEVICE: "cpu"
  FIBER:
    VISION: {EMBED_DIM: 16, DEPTHS: [1, 1, 2, 1], NUM_HEADS: [1, 1, 2, 2], WINDOW: 2,
             FUSED_BLOCKS: [0, 0, 1, 1], DROP_PATH: 0.0}
    TEXT: {VOCAB_SIZE: 2000, DIM: 32, NUM_LAYERS: 2, NUM_HEADS: 2, MLP_DIM: 64, DROPOUT: 0.0,
           MAX_POSITIONS: 258}
    NECK: {OUT_CHANNELS: 16, DROP_BLOCK: 0.0}
    TOWER: {NUM_BLOCKS: 1, NORM_GROUPS: 4}
    POSTPROCESS: {SCORE_THRESH: 0.0}
FIBER:
  TOKENIZER: "shapes"
  TRAIN:
    START_CHECK: False
    LOG_PERIOD: 1
    WEIGHTS: "ema"
    EMA: {ENABLED: True, DECAY: 0.5}
    CHECKPOINTER: {MAX_TO_KEEP: 100}
    BEST: {ENABLED: True, METRIC: "shapes_detection_val/bbox/AP"}
    PLATEAU: {PATIENCE: 0}
    WEIGHT_DECAY_SCHEDULE: {ENABLED: True, RATIO: 0.5}
DATASETS:
  TRAIN: ("shapes_detection_train",)
  TEST: ("shapes_detection_val",)
DATALOADER: {NUM_WORKERS: 0, ASPECT_RATIO_GROUPING: False}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}
SOLVER: {IMS_PER_BATCH: 4, MAX_ITER: 8, BASE_LR: 0.0001, WEIGHT_DECAY: 0.0001, STEPS: [0.5, 0.75],
         LR_SCHEDULER_NAME: "PlateauLR", WARMUP_ITERS: 2, CHECKPOINT_PERIOD: 1}
TEST: {EVAL_PERIOD: 2}
SEED: 0
VERSION: 2
"""


@pytest.fixture(params=["LazyConfig", "CfgNode"])
def train(request, tmp_path, config_file, datasets_root):
    """Trains, or with more arguments does something else, into a folder below ``tmp_path``."""
    lazy = request.param == "LazyConfig"
    path = tmp_path / ("everything.py" if lazy else "everything.yaml")
    path.write_text(config_file.read_text() + LAZY if lazy else YAML)
    names = {"output": "train.output_dir", "weights": "train.init_checkpoint"}
    if not lazy:
        names = {"output": "OUTPUT_DIR", "weights": "MODEL.WEIGHTS"}

    def train(folder, *options, weights=None, kind="ema"):
        overrides = [f"{names['output']}={tmp_path / folder}"]
        overrides.append(f"{'train.weights' if lazy else 'FIBER.TRAIN.WEIGHTS'}={kind}")
        if weights is not None:
            overrides.append(f"{names['weights']}={weights}")
        main(["--config-file", str(path), *options, *overrides])
        return tmp_path / folder

    train.lazy = lazy
    register_all_builtin(str(datasets_root))
    yield train
    register_all_builtin()


def load(path):
    return torch.load(path, weights_only=True)


def same(first, second):
    """Whether nested states agree to the last bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def without_clock(trainer):
    hooks = {name: state for name, state in trainer["hooks"].items() if name != "TrainingClock"}
    return {**trainer, "hooks": hooks}


def predictions(folder):
    files = sorted((folder / "inference" / "shapes_detection_val").glob("coco*results.json"))
    assert len(files) == 1
    return json.loads(files[0].read_text())


def rates_after(values):
    """Factors of the rate after each evaluation, with a patience of 0, drops of a tenth."""
    best, factor, found = 0.0, 1.0, []
    for value in values:
        if value > best * (1 + 1e-4):
            best = value
        elif value:
            factor /= 10
        found.append(factor)
    return found


def test_everything_at_once(tmp_path, train):
    whole = train("whole")
    content = load(whole / "model_final.pth")
    step = content["trainer"] if train.lazy else content["trainer"]["_trainer"]
    state = step["optimizer"]["param_groups"]

    # Weight decay falls at the iterations 2 and 3; biases have none.
    assert {round(group["weight_decay"] / 1e-4, 9) for group in state} == {0.01, 0.0}
    # The rate follows the metrics; the last evaluation comes after the checkpoint.
    best = json.loads((whole / "best.json").read_text())
    values = [row["value"] for row in best["evaluations"]]
    assert [row["iteration"] for row in best["evaluations"]] == [1, 3, 5, 7]
    # Twice the evaluation has been within the warm-up: each of its calls counts.
    expected = max(1e-4 * rates_after(values)[2], 1e-6)
    assert min(group["lr"] for group in state) == pytest.approx(expected)
    assert {round(group["lr"] / expected, 6) for group in state} <= {1.0, 2.0}

    # Averages: half of what they were, half of the weights, in each iteration.
    averages = load(whole / "model_0000003.pth")["ema"]
    for iteration in (4, 5, 6, 7):
        weights = load(whole / f"model_{iteration:07d}.pth")["model"]
        averages = {
            name: 0.5 * value + 0.5 * weights[name] if value.is_floating_point() else weights[name]
            for name, value in averages.items()
        }
    for name, value in averages.items():
        torch.testing.assert_close(content["ema"][name], value, rtol=1e-6, atol=1e-8)

    # A run that goes on after an iteration with an evaluation, and after one without.
    for last in (3, 4):
        half = tmp_path / f"from{last}"
        half.mkdir()
        shutil.copy(whole / f"model_{last:07d}.pth", half)
        (half / "last_checkpoint").write_text(f"model_{last:07d}.pth")
        train(half.name, "--resume")
        found = load(half / "model_final.pth")
        assert same(found["model"], content["model"])
        assert same(found["ema"], content["ema"])
        assert same(without_clock(found["trainer"]), without_clock(content["trainer"]))

    # What the training evaluated at its end were the averages.
    final = whole / "model_final.pth"
    averaged = train("averaged", "--eval-only", weights=final)
    plain = train("plain", "--eval-only", weights=final, kind="model")
    assert predictions(averaged) == predictions(whole)
    assert predictions(plain) != predictions(whole)
    for folder, kind in ((whole, "ema"), (averaged, "ema"), (plain, "model")):
        text = (folder / "inference" / "shapes_detection_val" / "results.json").read_text()
        assert json.loads(text)["protocol"]["weights"] == kind
