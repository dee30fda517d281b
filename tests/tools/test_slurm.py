"""The Slurm script, with programs in place of Slurm's and of Python."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fiber_d2.engine.errors import LOST_CONTACT_EXIT_CODE, PREEMPTED_EXIT_CODE

SCRIPT = Path(__file__).parents[2] / "tools" / "slurm" / "train.sbatch"

# Runs its command on each "node" at once; like the real one it reports the highest exit code.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
jobs=()
for node in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_NODEID=$node "$@" &
    jobs+=($!)
done
highest=0
for job in "${jobs[@]}"; do
    wait "$job"
    code=$?
    [ "$code" -gt "$highest" ] && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.txt
[ "$1 $2" = "show hostnames" ] && printf 'node-a\\nnode-b\\n'
exit 0
"""
PYTHON = """#!/bin/bash
printf '%s\\n' "$@" > "arguments_$SLURM_NODEID.txt"
[ "$SLURM_NODEID" = 1 ] && exec sleep "$SECONDS_TO_TAKE"
exit "$CODE"
"""


def start(folder, code, **environment):
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "a python": PYTHON}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FIBER_PYTHON": f"{folder}/a python",
        "CODE": str(code),
        "SECONDS_TO_TAKE": "0",
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), "--config-file", "a file.py", "train.seed=1"],
        cwd=folder,
        env={**os.environ, **slurm, **environment},
    )


def requeued(folder):
    return "requeue 41234" in (folder / "scontrol.txt").read_text()


def test_what_each_node_is_told(tmp_path):
    assert start(tmp_path, 0).wait() == 0
    for node in (0, 1):
        arguments = (tmp_path / f"arguments_{node}.txt").read_text().splitlines()
        assert arguments == [
            *("train_net.py", "--resume", "--num-gpus", "8", "--num-machines", "2"),
            *("--machine-rank", str(node), "--dist-url", "tcp://node-a:21234"),
            *("--config-file", "a file.py", "train.seed=1"),
        ]
    assert not requeued(tmp_path)


@pytest.mark.parametrize("code", [PREEMPTED_EXIT_CODE, LOST_CONTACT_EXIT_CODE])
def test_pre_emption_and_lost_nodes_go_back_into_the_queue(tmp_path, code):
    assert start(tmp_path, code).wait() == 0
    assert requeued(tmp_path)


def test_not_for_ever(tmp_path):
    job = start(tmp_path, 75, SLURM_RESTART_COUNT="3", FIBER_MAX_RESTARTS="3")
    assert job.wait() == 75
    assert not requeued(tmp_path)


@pytest.mark.parametrize("code", [1, 2])
def test_mistakes_and_failures_end_the_job(tmp_path, code):
    assert start(tmp_path, code).wait() == code
    assert not requeued(tmp_path)


def test_a_signal_to_the_script_does_not_end_it_before_the_processes(tmp_path):
    job = start(tmp_path, 75, SECONDS_TO_TAKE="2")
    while not (tmp_path / "arguments_1.txt").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 0
    assert requeued(tmp_path)
