"""Best checkpoint, early stop and the few-shot protocol in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture
def start_protocol(tmp_path, datasets_root):
    """Start the command in ``tmp_path``: ``start_protocol(*arguments) -> Popen``."""
    started = []

    def start(*arguments):
        variables = {"DETECTRON2_DATASETS": str(datasets_root), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "fiber_d2.engine.fewshot", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
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
def checkpoint(tmp_path, config_file):
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(config_file)).model)
    path = tmp_path / "start.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def finish(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def times(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("results.json"))}


def test_the_protocol_from_an_interruption_to_the_table(
    tmp_path, config_file, checkpoint, start_protocol
):
    arguments = [
        *("--dataset", "shapes_detection", "--config-file", config_file, "--allow-fewer"),
        *("--shots", 1, 2, "--seeds", 3, 30, "--output", "out"),
        f"train.init_checkpoint={checkpoint}",
        *("train.max_iter=4", "train.eval_period=2", "train.checkpointer.period=1"),
        "train.start_check=false",
    ]
    out = tmp_path / "out"
    process = start_protocol(*arguments)
    second = out / "1shot_seed30"
    deadline = time.monotonic() + 400
    while not (second / "last_checkpoint").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err == "fiber_d2.engine.fewshot: interrupted. The same command goes on from here.\n"
    first = json.loads((out / "1shot_seed3" / "run.json").read_text())["results"]
    assert first["iterations"] == 4
    assert "results" not in json.loads((second / "run.json").read_text())
    assert json.loads((out / "table.json").read_text())["complete"] is False
    before = times(out / "1shot_seed3")

    code, printed, err = finish(start_protocol(*arguments))
    assert code == 0, err
    assert "zero-shot: finished before" in printed
    assert "1-shot, seed 3: finished before" in printed
    assert "1-shot, seed 30: going on after an interruption" in printed
    assert "Resuming after iteration" in (second / "output.txt").read_text()
    assert times(out / "1shot_seed3") == before

    table = json.loads((out / "table.json").read_text())
    assert table["complete"] is True
    rows = table["rows"]
    assert [row["shots"] for row in rows] == ["zero-shot", 1, 2]
    for row in rows[1:]:
        assert row["seeds"] == [3, 30]
        assert row["iterations"] == [4, 4]
        for number, seed in enumerate(row["seeds"]):
            folder = out / f"{row['shots']}shot_seed{seed}"
            best = json.loads((folder / "best.json").read_text())
            values = [entry["value"] for entry in best["evaluations"]]
            assert [entry["iteration"] for entry in best["evaluations"]] == [1, 3]
            assert row["val"][number] == best["best"]["value"] == max(values)
            # Validation and test are the same images here, and so is the model.
            results = folder / "best" / "inference" / "shapes_detection_val" / "results.json"
            content = json.loads(results.read_text())
            assert content["protocol"]["checkpoint"].endswith("model_best.pth")
            tested = row["test"]["bbox/AP"]["values"][number]
            assert tested == content["results"]["bbox"]["AP"] == max(values)
            assert [path.name for path in folder.glob("*.pth")] == ["model_best.pth"]
    markdown = (out / "table.md").read_text()
    assert "| zero-shot" in markdown and "optimistic" in markdown

    # All is done: nothing is computed again, also for a part of it.
    before = times(out)
    code, printed, err = finish(start_protocol(*arguments))
    assert code == 0, err
    assert times(out) == before
    assert json.loads((out / "table.json").read_text()) == table
    # With other settings it is another protocol.
    code, _, err = finish(start_protocol(*arguments, "optimizer.lr=0.1"))
    assert code == 2
    assert "holds a run of other settings (another recipe): choose another --output" in err
    assert err.count("\n") == 1


def test_mistakes_are_found_before_training(
    tmp_path, config_file, checkpoint, datasets_root, start_protocol
):
    recipe = ("--config-file", config_file)
    given = f"train.init_checkpoint={checkpoint}"
    annotations = datasets_root / "shapes" / "annotations"
    own = ("--train-json", annotations / "instances_train.json", "--image-root", datasets_root)
    known = ("--dataset", "shapes_detection", *recipe)
    mistakes = (
        (("--dataset", "shape", *recipe, given), "Did you mean shapes_"),
        (known, "give train.init_checkpoint=FILE.pth"),
        ((*known, "--shots", 99, given), "has fewer than 99 images"),
        (("--dataset", "mine", *recipe, *own, given), "need --train-json, --val-json and --image-"),
    )
    processes = [start_protocol(*arguments) for arguments, _ in mistakes]
    for process, (_, message) in zip(processes, mistakes):
        code, _, err = finish(process)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


def test_a_failing_run_says_where_to_look(tmp_path, config_file, checkpoint, start_protocol):
    process = start_protocol(
        *("--dataset", "shapes_detection", "--config-file", config_file, "--allow-fewer"),
        *("--shots", 1, "--seeds", 3, "--no-zero-shot", "--metric", "bbox/mAP"),
        f"train.init_checkpoint={checkpoint}",
        *("train.max_iter=1", "train.start_check=false"),
    )
    code, _, err = finish(process)
    assert code == 1
    assert "The run of 1-shot, seed 3 ended with exit code 1" in err
    assert "no number 'shapes_detection_val/bbox/mAP'" in err
    assert "there are: shapes_detection_val/bbox/AP" in err


FALLING = """
from detectron2.evaluation import DatasetEvaluator


class Falling(DatasetEvaluator):
    calls = 0

    def __init__(self, dataset_name, output_dir=None):
        pass

    def evaluate(self):
        Falling.calls += 1
        return {"bbox": {"AP": 10.0 - Falling.calls}}


dataloader.evaluator = L(Falling)()
"""


def test_a_stalled_training_stops_and_stays_stopped(tmp_path, config_file, run):
    config_file.write_text(config_file.read_text() + FALLING)
    arguments = [
        *("--config-file", config_file, "train.output_dir=out", "train.self_check=false"),
        *("train.max_iter=40", "train.eval_period=2", "train.early_stop={patience:2}"),
        "train.test_best=[shapes_detection_train]",
    ]
    code, _, err = run(*arguments, "train.best={metric:shapes/AP}")
    assert code == 2
    assert "begin with the name of a test set" in err
    arguments.append("train.best={metric:shapes_detection_val/bbox/AP}")
    code, printed, err = run(*arguments)
    assert code == 0, err
    assert "Training ends after iteration 5" in printed
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert [(e["iteration"], e["value"]) for e in best["evaluations"]] == [(1, 9), (3, 8), (5, 7)]
    assert best["best"] == {"iteration": 1, "value": 9}
    assert best["stopped_early"]
    assert best["test"] == {"shapes_detection_train": {"bbox/AP": 6}}
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_final.pth"
    step = torch.load(tmp_path / "out" / "model_best.pth", weights_only=True)
    assert step["iteration"] == 1

    written = (tmp_path / "out" / "best.json").read_text()
    code, printed, err = run("--resume", *arguments)
    assert code == 0, err
    assert "Training has ended before" in printed
    assert "has been tested before" in printed
    assert (tmp_path / "out" / "best.json").read_text() == written


def test_a_finished_training_is_tested_once(tmp_path, config_file, run):
    config_file.write_text(config_file.read_text() + FALLING)
    arguments = [
        *("--config-file", config_file, "train.output_dir=out", "train.self_check=false"),
        *("train.max_iter=4", "train.eval_period=2", "train.start_check=false"),
        "train.test_best=[shapes_detection_train]",
        "train.best={metric:shapes_detection_val/bbox/AP}",
    ]
    code, _, err = run(*arguments)
    assert code == 0, err
    written = (tmp_path / "out" / "best.json").read_text()
    assert [entry["iteration"] for entry in json.loads(written)["evaluations"]] == [1, 3]
    for _ in range(2):
        code, printed, err = run("--resume", *arguments)
        assert code == 0, err
        assert "All iterations are done" in printed
        assert "has been tested before" in printed
        assert (tmp_path / "out" / "best.json").read_text() == written


YAML = """
MODEL:
  META_ARCHITECTURE: "FIBER"
  DEVICE: "cpu"
  FIBER:
    VISION: {EMBED_DIM: 16, DEPTHS: [1, 1, 2, 1], NUM_HEADS: [1, 1, 2, 2], WINDOW: 2,
             FUSED_BLOCKS: [0, 0, 1, 1]}
    TEXT: {VOCAB_SIZE: 1500, DIM: 32, NUM_LAYERS: 2, NUM_HEADS: 2, MLP_DIM: 64}
    NECK: {OUT_CHANNELS: 16}
    TOWER: {NUM_BLOCKS: 1, NORM_GROUPS: 4}
FIBER:
  TOKENIZER: "shapes"
  TRAIN:
    START_CHECK: False
    BEST: {ENABLED: True, METRIC: "shapes_detection_val/bbox/AP"}
    EARLY_STOP: {ENABLED: True, PATIENCE: 9}
    TEST_BEST: ["shapes_detection_train"]
DATASETS: {TRAIN: ["shapes_detection_train"], TEST: ["shapes_detection_val"]}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}
SOLVER: {IMS_PER_BATCH: 4, MAX_ITER: 4, WARMUP_ITERS: 2, STEPS: [3]}
TEST: {EVAL_PERIOD: 2}
OUTPUT_DIR: "out"
VERSION: 2
"""


def test_yaml_keeps_and_tests_the_best_checkpoint(tmp_path, run):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    code, _, err = run("--config-file", path)
    assert code == 0, err
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert [entry["iteration"] for entry in best["evaluations"]] == [1, 3]
    assert best["patience"] == 9
    assert best["test"].keys() == {"shapes_detection_train"}
    folder = tmp_path / "out" / "best" / "inference" / "shapes_detection_train"
    content = json.loads((folder / "results.json").read_text())
    assert content["protocol"]["checkpoint"].endswith("model_best.pth")
    assert content["results"]["bbox"]["AP"] == best["test"]["shapes_detection_train"]["bbox/AP"]
