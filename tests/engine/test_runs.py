"""Whole runs of train_net.py, each in processes of its own."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def losses(folder):
    """Iteration -> loss at that iteration."""
    lines = (folder / "training.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def differing(folder, other):
    """Names of the final weights that are not equal to the last bit."""
    first, second = (
        torch.load(place / "model_final.pth", weights_only=True)["model"]
        for place in (folder, other)
    )
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_processes_and_machines_train_on_the_same_batches(tmp_path, config_file, run, start):
    overrides = ["train.max_iter=2", "dataloader.test=null"]
    code, _, err = run("--config-file", config_file, *overrides, "train.output_dir=one")
    assert code == 0, err
    two = ["--config-file", config_file, "--num-gpus", 2]
    code, _, err = run(*two, *overrides, "train.output_dir=two")
    assert code == 0, err
    assert err == ""
    url = f"tcp://127.0.0.1:{find_free_port()}"
    machines = [
        start(
            *("--config-file", config_file, "--num-machines", 2, "--machine-rank", rank),
            *("--dist-url", url, *overrides, f"train.output_dir=machine{rank}"),
        )
        for rank in (0, 1)
    ]
    for machine in machines:
        _, err = machine.communicate(timeout=240)
        assert machine.returncode == 0, err

    expected = losses(tmp_path / "one")
    assert expected[0] != expected[1]
    # 2 images in each process, 4 in the single one.
    for name in ("two", "machine0"):
        found = losses(tmp_path / name)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found[1] == pytest.approx(expected[1], rel=1e-4)


def test_processes_evaluate_like_one(tmp_path, config_file, run):
    common = ["train.max_iter=1", "train.output_dir=trained"]
    assert run("--config-file", config_file, *common)[0] == 0
    checkpoint = "train.init_checkpoint=trained/model_final.pth"
    for number in (1, 2):
        arguments = ["--config-file", config_file, "--eval-only", "--num-gpus", number]
        code, _, err = run(*arguments, checkpoint, f"train.output_dir={number}", "train.pictures=2")
        assert code == 0, err
    found = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        results = folder / "inference" / "shapes_detection_val" / "results.json"
        content = json.loads(results.read_text())
        protocol = content["protocol"]
        assert protocol["dataset"] == "shapes_detection_val"
        assert protocol["checkpoint"] == "trained/model_final.pth"
        assert protocol["caption_of_first_image"].startswith("red circle. ")
        drawn = (folder / "pictures" / "shapes_detection_val").iterdir()
        assert len(list(drawn)) == 3
        boxes = [json.loads(p.read_text()) for p in results.parent.glob("*results.json")]
        found.append((content["results"], sorted(len(part) for part in boxes)))
    assert found[0] == found[1]
    assert max(found[0][1]) > 100  # boxes, of the file of predictions


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_mistake_costs_one_line(tmp_path, config_file, run, num_processes):
    arguments = ["--config-file", config_file, "--num-gpus", num_processes]
    for environment, override, message in (
        ({}, "train.max_itr=1", "did you mean train.max_iter?"),
        ({"DETECTRON2_DATASETS": "nowhere"}, "train.seed=1", "nowhere/shapes/annotations"),
        ({}, "train.init_checkpoint=no.pth", "no.pth does not exist"),
    ):
        code, _, err = run(*arguments, override, "train.output_dir=failed", **environment)
        assert code == 2
        assert err.startswith("fiber-d2-train: error: ")
        assert err.count("\n") == 1
        assert message in err
        log = tmp_path / "failed" / "error.log"
        assert log.read_text().startswith("Traceback")
        log.unlink()
    _, _, err = run(*arguments, "train.max_itr=1", FIBER_TRACEBACK="1")
    assert err.startswith("Traceback")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_failure_while_training_names_the_iteration(
    tmp_path, config_file, datasets_root, run, num_processes
):
    shutil.copytree(datasets_root, tmp_path / "damaged")
    for path in (tmp_path / "damaged" / "shapes" / "images" / "train").iterdir():
        path.write_bytes(b"no image")
    code, _, err = run(
        *("--config-file", config_file, "--num-gpus", num_processes, "train.output_dir=out"),
        "train.start_check=False",  # it would find the images before
        DETECTRON2_DATASETS=str(tmp_path / "damaged"),
    )
    assert code == 1
    assert "Traceback" in err
    last = err.rstrip().splitlines()[-1]
    assert last.startswith("fiber_d2.engine.errors.RunError: Training stopped at iteration 0 of 6")
    assert "iteration 0 of 6" in (tmp_path / "out" / "error.log").read_text()


YAML = """
MODEL:
  META_ARCHITECTURE: "FIBER"
  DEVICE: "cuda"
  FIBER:
    VISION:
      {{EMBED_DIM: 16, DEPTHS: [1, 1, 2, 1], NUM_HEADS: [1, 1, 2, 2], WINDOW: 2,
        FUSED_BLOCKS: [0, 0, 1, 1], DROP_PATH: 0.0}}
    TEXT: {{VOCAB_SIZE: 1500, DIM: 32, NUM_LAYERS: 2, NUM_HEADS: 2, MLP_DIM: 64, DROPOUT: 0.1}}
    NECK: {{OUT_CHANNELS: 16}}
    TOWER: {{NUM_BLOCKS: 1, NORM_GROUPS: 4}}
FIBER:
  TOKENIZER: "shapes"
  TRAIN: {{ACCUMULATE: 2}}
DATASETS:
  TRAIN: ("shapes_detection_train",)
  TEST: ("shapes_detection_val",)
INPUT: {{MIN_SIZE_TRAIN: [{size}], MIN_SIZE_TEST: {size}}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER:
  IMS_PER_BATCH: 4
  BASE_LR: 0.001
  WARMUP_ITERS: 2
  STEPS: (8,)
  CHECKPOINT_PERIOD: 3
  CLIP_GRADIENTS: {{ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 1.0}}
  AMP: {{ENABLED: {amp}}}
SEED: 1
VERSION: 2
"""


def test_yaml_trains_resumes_and_evaluates(tmp_path, run):
    path = tmp_path / "config.yaml"
    path.write_text(YAML.format(amp="False", size=64))
    whole = ["--config-file", path, "SOLVER.MAX_ITER=6", "OUTPUT_DIR=whole"]
    code, _, err = run(*whole)
    assert code == 0, err
    # The same six iterations in two pieces.
    half = ["SOLVER.MAX_ITER", "6", "OUTPUT_DIR", "half"]
    code, _, err = run("--config-file", path, *half)
    assert code == 0, err
    (tmp_path / "half" / "model_final.pth").unlink()
    (tmp_path / "half" / "model_0000005.pth").unlink()
    (tmp_path / "half" / "last_checkpoint").write_text("model_0000002.pth")
    code, _, err = run("--config-file", path, "--resume", *half)
    assert code == 0, err
    assert differing(tmp_path / "whole", tmp_path / "half") == []

    code, _, err = run(
        *("--config-file", path, "--eval-only", "--num-gpus", 2),
        *("MODEL.WEIGHTS=whole/model_final.pth", "OUTPUT_DIR=tested"),
    )
    assert code == 0, err
    folders = [
        tmp_path / name / "inference" / "shapes_detection_val" for name in ("whole", "tested")
    ]
    contents = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert contents[0]["results"] == contents[1]["results"]


def test_yaml_with_mixed_precision_in_two_cpu_processes(tmp_path, run):
    path = tmp_path / "config.yaml"
    # At 64 pixels p7 would come from a map of one pixel, where the weight gradient of torch's
    # bfloat16 convolution with stride 2 is left uninitialised on CPUs (seen with 2.14.1).
    path.write_text(YAML.format(amp="True", size=128))
    code, _, err = run(
        *("--config-file", path, "--num-gpus", 2, "SOLVER.MAX_ITER=2", "OUTPUT_DIR=out"),
        "DATASETS.TEST=()",
    )
    assert code == 0, err
    assert (tmp_path / "out" / "model_final.pth").exists()


def test_data_that_a_user_registered(tmp_path, datasets_root, config_file, run):
    shapes = datasets_root / "shapes"
    (tmp_path / "mine.py").write_text(
        "from detectron2.data.datasets import register_coco_instances\n"
        f"register_coco_instances('mine', {{}}, '{shapes}/annotations/instances_val.json',\n"
        f"                        '{shapes}/images/val')\n"
    )
    code, out, err = run(
        *("--config-file", config_file, "--import", "mine.py", "--eval-only"),
        *("dataloader.test.dataset=mine", "train.output_dir=out", "train.pictures=1"),
    )
    assert code == 0, err
    assert "weights are random" in out
    assert (tmp_path / "out" / "inference" / "mine" / "results.json").exists()
    pictures = tmp_path / "out" / "pictures"
    assert (pictures / "mine" / "contact_sheet.png").exists()
    assert (pictures / "contact_sheet.png").exists()


def test_the_recipe_for_custom_data(tmp_path, datasets_root, run):
    shapes = datasets_root / "shapes"
    arguments = [
        *("--config-file", REPOSITORY / "configs" / "finetune" / "custom_coco.py", "--eval-only"),
        *("train.output_dir=out", "train.init_checkpoint=''", "train.pictures=1"),
        f"data.train_json={shapes}/annotations/instances_train.json",
        f"data.image_root={shapes}/images/val",
    ]
    code, _, err = run(*arguments, f"data.val_json={shapes}/annotations/instances_val.json")
    assert code == 0, err
    assert (tmp_path / "out" / "inference" / "custom_val" / "results.json").exists()
    code, _, err = run(*arguments, "data.val_json=no.json")
    assert code == 2
    assert err.count("\n") == 1
    assert "no.json" in err
