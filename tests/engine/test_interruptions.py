"""Runs of train_net.py that are killed, stopped, starved of disk or of their own processes."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
PREEMPTED = 75
LOST_CONTACT = 3

pytestmark = pytest.mark.slow

# What makes going on hard: random numbers in each step, several batches per step, data sets that
# are mixed differently from a step on, averaged weights, loading processes ahead of the training.
HARD = [
    "train.accumulate=2",
    "train.ema={decay: 0.9}",
    "+dataloader.train.weights={0: [1, 1], 9: [1, 3]}",
    "dataloader.train.num_workers=1",
    "dataloader.test=null",
]


def rows(folder):
    """(iteration, loss) of all steps that were done, those done again included."""
    path = folder / "training.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [(row["iteration"], row["total_loss"]) for row in found if "total_loss" in row]


def content(path):
    return torch.load(path, weights_only=True)


def flat(value, prefix=""):
    """Nested containers as {path: leaf}."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    else:
        return {prefix: value}
    return {k: v for key, inner in value for k, v in flat(inner, f"{prefix}/{key}").items()}


def differing(first, second):
    """Paths of what two checkpoints do not have in common to the last bit, but for the clock."""
    first, second = flat(content(first)), flat(content(second))

    def equal(name):
        a, b = first.get(name), second.get(name)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    names = [name for name in first.keys() | second.keys() if "TrainingClock" not in name]
    return [name for name in names if not equal(name)]


def wait_for(condition, process):
    """A process may be slow, but it must not end."""
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def step_done(folder, iteration):
    return lambda: any(i >= iteration for i, _ in rows(folder))


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def training_processes(pid):
    """Pids of the ranks, and of the loading processes of a single one."""
    found = []
    for child in children(pid):
        with contextlib.suppress(FileNotFoundError):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"resource_tracker" not in command:
                found.append(child)
    return found


SINGLE = [*HARD, "train.max_iter=24", "train.checkpointer.period=4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, datasets_root, dropout_config):
    """Folder of a run in one process that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.py").write_text(dropout_config)
    done = train(folder, datasets_root, "--config-file", "config.py", *SINGLE)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def train(folder, datasets_root, *arguments, **options):
    variables = {"DETECTRON2_DATASETS": str(datasets_root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train_net.py"), *arguments, "train.output_dir=out"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        **options,
    )


def test_a_run_killed_three_times_gives_the_same_losses(
    tmp_path, whole, dropout_config_file, run, start
):
    arguments = ["--config-file", dropout_config_file, *SINGLE, "train.output_dir=out"]
    folder = tmp_path / "out"
    generator = random.Random(0)
    for number in range(3):
        process = start("--resume", *arguments)
        # Somewhere in the part that has not been reached before.
        reached = max((i for i, _ in rows(folder)), default=0)
        iteration = generator.randint(reached + 1, 7 * (number + 1))
        wait_for(step_done(folder, iteration), process)
        process.kill()
        process.communicate()
    code, out, err = run("--resume", *arguments)
    assert code == 0, err
    assert "Resuming after iteration" in out

    expected = dict(rows(whole))
    done = rows(folder)
    assert len(done) > len(expected) == 24
    assert [(i, loss) for i, loss in done if expected[i] != loss] == []
    assert dict(done).keys() == expected.keys()
    assert "ema" in content(whole / "model_final.pth")
    assert differing(whole / "model_final.pth", folder / "model_final.pth") == []


def test_a_signal_saves_and_the_run_goes_on(tmp_path, whole, dropout_config_file, run, start):
    arguments = ["--config-file", dropout_config_file, *SINGLE, "train.output_dir=out"]
    arguments += ["train.checkpointer.period=100"]
    process = start(*arguments)
    wait_for(step_done(tmp_path / "out", 3), process)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == PREEMPTED, err
    check_words(err)
    code, _, err = run("--resume", *arguments)
    assert code == 0, err
    # No iteration is done twice, and none is left out.
    assert rows(tmp_path / "out") == rows(whole)


def check_words(err):
    found = re.fullmatch(
        r"fiber-d2-train: ended by a signal after iteration (\d+); everything is saved in "
        r"out/model_(\d+)\.pth\. The same command with --resume goes on\.\n",
        err,
    )
    assert found, err
    assert int(found[1]) == int(found[2])


def test_two_processes_go_on_after_a_signal_and_after_a_kill(
    tmp_path, dropout_config_file, run, start
):
    arguments = ["--config-file", dropout_config_file, "--num-gpus", 2, *HARD]
    arguments += ["train.max_iter=16", "train.checkpointer.period=5"]
    code, _, err = run(*arguments, "train.output_dir=whole")
    assert code == 0, err
    folder = tmp_path / "out"
    process = start(*arguments, "train.output_dir=out")
    wait_for(step_done(folder, 2), process)
    # As Slurm does where it is asked to; the other one is sent to one process alone below.
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate()
    assert process.returncode == PREEMPTED, err
    check_words(err)
    process = start("--resume", *arguments, "train.output_dir=out")
    wait_for(step_done(folder, 11), process)
    process.kill()
    process.communicate()
    code, _, err = run("--resume", *arguments, "train.output_dir=out")
    assert code == 0, err
    expected = dict(rows(tmp_path / "whole"))
    for iteration, loss in rows(folder):
        assert loss == pytest.approx(expected[iteration], rel=1e-5)
    assert dict(rows(folder)).keys() == expected.keys()


def test_a_damaged_last_checkpoint_is_passed_over(tmp_path, whole, dropout_config_file, run):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    last, flipped = folder / "model_final.pth", folder / "model_0000023.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    damaged = bytearray(flipped.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    flipped.write_bytes(damaged)
    arguments = ["--config-file", dropout_config_file, *SINGLE, "train.output_dir=out"]
    code, out, err = run("--resume", *arguments)
    assert code == 0, err
    assert "model_final.pth: File is not a zip file" in out
    assert re.search(r"model_0000023\.pth: the checksum of \S+ differs", out)
    assert "going on from the one before, model_0000019.pth" in out
    assert differing(whole / "model_final.pth", last) == []


def test_a_signal_to_one_process_only_stops_all(tmp_path, config_file, start):
    arguments = ["--config-file", config_file, "--num-gpus", 2, "dataloader.test=null"]
    process = start(*arguments, "train.max_iter=2000", "train.output_dir=out")
    wait_for(step_done(tmp_path / "out", 3), process)
    os.kill(training_processes(process.pid)[1], signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == PREEMPTED, err
    assert "everything is saved" in err


def test_a_signal_while_evaluating(tmp_path, config_file, run, start):
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "from fiber_d2.modeling.fiber import FIBER\n"
        "inference = FIBER.inference\n"
        "def slow(self, batch):\n"
        "    open('evaluating', 'w').close()\n"
        "    time.sleep(0.5)\n"
        "    return inference(self, batch)\n"
        "FIBER.inference = slow\n"
    )
    arguments = ["--config-file", config_file, "--import", "slow.py", "train.eval_period=3"]
    arguments += ["train.checkpointer.period=100", "train.output_dir=out"]
    process = start(*arguments)
    wait_for((tmp_path / "evaluating").exists, process)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == PREEMPTED, err
    assert err.startswith("fiber-d2-train: ended by SIGTERM.")
    # Nothing was saved before the evaluation.
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000002.pth"
    code, _, err = run("--resume", *arguments)
    assert code == 0, err
    assert [iteration for iteration, _ in rows(tmp_path / "out")] == list(range(6))


def test_a_signal_before_training_ends_with_the_same_code(tmp_path, config_file, start):
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "import fiber_d2.engine.train as train\n"
        "def slow(cfg, model):\n"
        "    open('started', 'w').close()\n"
        "    time.sleep(200)\n"
        "train.build_optimizer = slow\n"
    )
    process = start("--config-file", config_file, "--import", "slow.py", "train.output_dir=out")
    wait_for((tmp_path / "started").exists, process)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == PREEMPTED, err
    assert "with nothing to save" in err


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, whole, datasets_root):
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    shutil.copy(whole.parent / "config.py", tmp_path)
    (folder / "last_checkpoint").write_text("model_0000019.pth")
    before = (folder / "model_0000019.pth").read_bytes()
    names = sorted(path.name for path in folder.glob("model*"))

    def allow_small_files_only():
        limit = len(before) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ["--config-file", "config.py", "--resume", *SINGLE]
    done = train(tmp_path, datasets_root, *arguments, preexec_fn=allow_small_files_only)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "Training stopped at iteration 23 of 24: out/model_0000023.pth cannot" in done.stderr
    assert "File too large" in done.stderr
    assert (folder / "last_checkpoint").read_text() == "model_0000019.pth"
    assert (folder / "model_0000019.pth").read_bytes() == before
    assert sorted(path.name for path in folder.glob("model*")) == names


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_loading_process_is_named(tmp_path, config_file, start, how):
    process = start(
        *("--config-file", config_file, "train.max_iter=5000", "train.output_dir=out"),
        *("dataloader.train.num_workers=1", "dataloader.train.timeout=10"),
        "dataloader.test=null",
    )
    wait_for(step_done(tmp_path / "out", 2), process)
    os.kill(training_processes(process.pid)[0], how)
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert err.count("\n") == 1, err
    assert re.match(r"fiber-d2-train: error: Training stopped at iteration \d+ of 5000: ", err)
    if how == signal.SIGKILL:
        assert "a data-loading process has ended (DataLoader worker (pid" in err
        assert "lower dataloader.train.num_workers" in err
    else:
        assert "gave no batch for 10 seconds" in err


def test_a_lost_rank_ends_the_job(tmp_path, config_file, start):
    process = start(
        *("--config-file", config_file, "--num-gpus", 2, "train.max_iter=5000"),
        *("train.output_dir=out", "dataloader.test=null"),
    )
    wait_for(step_done(tmp_path / "out", 2), process)
    os.kill(training_processes(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == LOST_CONTACT, err
    assert err.count("\n") == 1, err
    assert "rank 1 was ended by SIGKILL" in err
    assert "--resume" in err
