"""Whole evaluations by train_net.py that are interrupted, killed, resumed, and distributed."""

import contextlib
import json
import os
import runpy
import shutil
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

# Test-time augmentation of a kind: the same results, later.
WRAPPER = """
import os
import time

from torch import nn


class Slow(nn.Module):
    def __init__(self, model, *, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, inputs):
        time.sleep(float(os.environ.get("SLOW", 0)))
        outputs = self.model(inputs)
        for output in outputs:
            output["instances"].scores = output["instances"].scores * self.factor
        return outputs
"""

ADDITION = """
import os

from wrapper import Slow

train.tta = L(Slow)(factor=0.5)
grounding = copy.deepcopy(dataloader.test)
grounding.dataset = "shapes_grounding_val"
refexp = copy.deepcopy(dataloader.test)
refexp.update(dataset="shapes_refexp_val", batch_size=2)
dataloader.test = [dataloader.test, grounding, refexp]
for node in dataloader.test:
    node.num_workers = int(os.environ.get("WORKERS", 0))
"""

SETS = {
    "shapes_detection_val": "coco_instances_results.json",
    "shapes_grounding_val": "flickr_predictions.json",
    "shapes_refexp_val": "refexp_predictions.json",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, datasets_root):
    """A folder with a configuration, and how to start evaluations in it."""
    config = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["CONFIG"]
    folder = tmp_path_factory.mktemp("evaluations")
    (folder / "wrapper.py").write_text(WRAPPER)
    text = config.format(repository=REPOSITORY, dropout=0.0)
    (folder / "config.py").write_text(text)
    model = LazyConfig.load(str(folder / "config.py")).model
    for seed in (0, 7):
        torch.manual_seed(seed)
        torch.save({"model": instantiate(model).state_dict()}, folder / f"{seed}.pth")
    (folder / "config.py").write_text(text + ADDITION)
    started = []

    def start(output_dir, *options, processes=1, workers=0, slow=0.0, root=datasets_root):
        arguments = ["--config-file", "config.py", "--eval-only", "--num-gpus", processes]
        process = subprocess.Popen(
            [
                *(sys.executable, str(REPOSITORY / "train_net.py")),
                *map(str, [*arguments, *options, f"train.output_dir={output_dir}"]),
                "train.init_checkpoint=0.pth",
            ],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": f"{REPOSITORY}:{folder}",
                "DETECTRON2_DATASETS": str(root),
                "OMP_NUM_THREADS": "1",
                "SLOW": str(slow),
                "WORKERS": str(workers),
            },
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    start.folder = folder
    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def found(folder):
    """Per data set its results, its protocol and its sorted predictions."""
    contents = {}
    for name, predictions in SETS.items():
        inference = folder / "inference" / name
        content = json.loads((inference / "results.json").read_text())
        saved = json.loads((inference / predictions).read_text())
        saved = sorted(json.dumps(record, sort_keys=True) for record in saved)
        contents[name] = (content["results"], saved)
    return contents


@pytest.fixture(scope="module")
def whole(place):
    finish(place("whole", "--vis", 2))
    return found(place.folder / "whole")


def wait_for_lines(process, folder, dataset, count):
    """Until so many batches of a data set are saved, whoever did them."""
    deadline = time.monotonic() + 240
    while True:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        files = (folder / "inference" / dataset).glob("partial_rank*.jsonl")
        if sum(path.read_text().count('{"positions"') for path in files) >= count:
            return
        time.sleep(0.02)


def insist(process, number):
    """The signal again and again, to the processes that this one has started, until it ends."""
    while process.poll() is None:
        for pid in map(
            int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(0.01)


def test_wrapper_protocol_and_pictures(place, whole):
    folder = place.folder / "whole"
    content = json.loads((folder / "inference/shapes_refexp_val/results.json").read_text())
    protocol = content["protocol"]
    assert protocol["test_time_augmentation"]["factor"] == 0.5
    assert protocol["captions_of_first_image"] == 1
    assert protocol["num_images"] > 5
    assert protocol["prompts_and_images"]["batch_size"] == 2
    assert protocol["prompts_and_images"]["augmentations"] == ["Resize(shape=(64, 64))"]
    assert protocol["limits"]["score_thresh"] == 0.0
    assert protocol["limits"]["scope"] == "per caption"
    assert protocol["weights"] == "model"
    assert {"fiber_d2", "torch", "detectron2"} <= set(protocol["versions"])
    log = (folder / "log.txt").read_text()
    assert "Protocol of shapes_refexp_val" in log
    assert "Self-check of shapes_refexp_val passed" in log
    # The wrapper halves scores, which are means of sigmoids of an untrained model.
    assert all(json.loads(r)["score"] < 0.5 for r in whole["shapes_detection_val"][1])
    for name in SETS:
        names = {path.name.split("_")[0] for path in (folder / "pictures" / name).iterdir()}
        assert names == {"best", "worst", "contact"}
    assert list((folder / "tensorboard").iterdir())
    assert not list(folder.glob("inference/*/partial*"))


@pytest.mark.parametrize(
    ("end", "before", "after", "workers"),
    [
        (signal.SIGINT, 1, 1, 1),
        (signal.SIGINT, 2, 2, 0),
        (signal.SIGINT, 2, 1, 1),
        (signal.SIGKILL, 1, 2, 0),
    ],
)
def test_what_is_interrupted_goes_on_to_the_same_numbers(place, whole, end, before, after, workers):
    output_dir = f"{end.name}_{before}_{workers}"
    folder = place.folder / output_dir
    process = place(output_dir, processes=before, workers=workers, slow=0.3)
    wait_for_lines(process, folder, "shapes_grounding_val", 3)
    if workers:
        # As a terminal does: every process hears of it.
        os.killpg(process.pid, end)
        if before > 1 and sys.platform == "linux":  # children are read from /proc
            insist(process, end)
    else:
        process.send_signal(end)
    if end == signal.SIGINT:
        _, err = finish(process, 130)
        assert err.count("\n") == 1
        assert err.startswith("fiber-d2-train: interrupted. ")
        assert "--resume-eval" in err
    else:
        process.communicate()
    assert not (folder / "inference" / "shapes_grounding_val" / "results.json").exists()

    if before == after == 1:
        (place.folder / "0.pth").rename(place.folder / "kept.pth")
        (place.folder / "7.pth").rename(place.folder / "0.pth")
        _, err = finish(place(output_dir, "--resume-eval"), 2)
        (place.folder / "kept.pth").rename(place.folder / "0.pth")
        assert "belong to another evaluation: weights was" in err
        assert err.count("\n") == 1

    out, _ = finish(place(output_dir, "--resume-eval", processes=after))
    assert found(folder) == whole
    assert "batches are saved: going on" in out
    # The first set was complete.
    assert "Evaluated 0 images" in out
    assert not list(folder.glob("inference/*/partial*"))


def test_a_second_interrupt_does_not_wait(place):
    process = place("twice", processes=2, workers=1, slow=60)
    batches = place.folder / "twice" / "inference" / "shapes_detection_val"
    deadline = time.monotonic() + 120
    while not batches.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = finish(process, 130)
    assert time.monotonic() - began < 30
    assert err.count("\n") == 1


def test_two_processes_score_what_one_scores(place, whole):
    finish(place("two", "--skip-self-check", "--vis", 2, processes=2))
    folder = place.folder / "two"
    assert found(folder) == whole
    assert "Self-check" not in (folder / "log.txt").read_text()
    for name in SETS:
        drawn = [
            sorted(path.name for path in (place.folder / run / "pictures" / name).iterdir())
            for run in ("whole", "two")
        ]
        assert drawn[0] == drawn[1]


def test_a_failed_self_check_costs_one_line(place, datasets_root):
    root = place.folder / "damaged"
    shutil.copytree(datasets_root, root)
    path = root / "shapes" / "annotations" / "finetune_shapes_val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [0, 0, 10, 10]
    content["images"][0]["caption"] = " ".join(["red"] * 300)
    path.write_text(json.dumps(content))
    _, err = finish(place("damaged_out", root=root), 2)
    assert err.count("\n") == 1
    assert "shapes_refexp_val" in err and "tokens" in err
    path = root / "shapes" / "annotations" / "final_flickr_separateGT_val.json"
    content = json.loads(path.read_text())
    content["images"][0]["tokens_positive_eval"].append([[0, 3]])
    path.write_text(json.dumps(content))
    shutil.copy(
        datasets_root / "shapes" / "annotations" / "finetune_shapes_val.json",
        root / "shapes" / "annotations" / "finetune_shapes_val.json",
    )
    _, err = finish(place("damaged_out", root=root), 2)
    assert err.count("\n") == 1
    assert "self-check of 'shapes_grounding_val' failed" in err
    assert "--skip-self-check" in err


def test_resume_eval_is_for_evaluations(place):
    process = subprocess.run(
        [sys.executable, REPOSITORY / "train_net.py", "--config-file", "c.py", "--resume-eval"],
        capture_output=True,
        text=True,
        cwd=place.folder,
    )
    assert process.returncode == 2
    assert "--resume-eval goes with --eval-only" in process.stderr
