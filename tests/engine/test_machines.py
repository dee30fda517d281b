"""Several machines in one: each with a network of its own where the system allows it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
TRAIN_NET = str(REPOSITORY / "train_net.py")
# For one machine to notice the end of another, on a busy computer.
PATIENCE = 150
CONFIG = ("--config-file", "config.py")

pytestmark = pytest.mark.slow


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def make_networks(names):
    """Two network namespaces with a cable between them: 10.213.7.1 and 10.213.7.2."""
    for name in names:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", names[1])
    for number, name in enumerate(names):
        ip("-n", name, "address", "add", f"10.213.7.{number + 1}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")


class Machines:
    """Starts programs on machine 0 and on machine 1."""

    def __init__(self, prefixes, host):
        self.prefixes = prefixes
        self.host = host
        self.started = []

    def start(self, rank, program, folder, **environment):
        variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(
            [*self.prefixes[rank], sys.executable, *map(str, program)],
            cwd=folder,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # All processes of a machine are one group: a power cut for all of them.
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def url(self):
        return f"tcp://{self.host}:{free_port()}"

    def end(self):
        for process in self.started:
            signal_machine(process, signal.SIGKILL)
            process.wait()


def free_port():
    """One that nobody on this computer listens on; networks of one's own have them all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def signal_machine(process, number):
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass  # all have ended


@pytest.fixture(scope="module")
def machines():
    names = [f"fiber_d2_{os.getpid()}_{rank}" for rank in (0, 1)]
    try:
        make_networks(names)
        found = Machines([["ip", "netns", "exec", name] for name in names], "10.213.7.1")
    except (OSError, subprocess.CalledProcessError):
        # Not root, or no `ip` here: both machines share the loopback network.
        found = Machines([[], []], "127.0.0.1")
    yield found
    found.end()
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


@pytest.fixture(scope="module")
def job(tmp_path_factory, datasets_root, machines, write_config):
    """``job(*arguments)``: train_net.py on two machines of two processes each, in one folder."""
    folder = tmp_path_factory.mktemp("job")
    write_config(folder / "config.py")

    def start(rank, *program):
        return machines.start(rank, program, folder, DETECTRON2_DATASETS=str(datasets_root))

    def job(*arguments):
        common = ["--num-gpus", 2, "--num-machines", 2, "--dist-url", machines.url()]
        return [
            start(rank, TRAIN_NET, *CONFIG, *common, "--machine-rank", rank, *arguments)
            for rank in (0, 1)
        ]

    job.start, job.folder = start, folder
    return job


def finish(processes):
    """Their messages, once all have ended."""
    messages = [process.communicate(timeout=240)[1] for process in processes]
    for process, message in zip(processes, messages):
        assert process.returncode == 0, message
    return messages


LENGTH = ["train.max_iter=30", "train.checkpointer.period=5"]


@pytest.fixture(scope="module")
def trained(job):
    """A folder: the same training by one process is in `one`, by two machines in `two`."""
    finish([job.start(0, TRAIN_NET, *CONFIG, *LENGTH, "train.output_dir=one")])
    assert finish(job(*LENGTH, "train.output_dir=two")) == ["", ""]
    return job.folder


def losses(folder):
    """Iteration -> loss at that iteration."""
    lines = (folder / "training.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}


def results(folder):
    path = folder / "inference" / "shapes_detection_val" / "results.json"
    return json.loads(path.read_text())["results"]


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_two_machines_train_like_one_process(trained):
    one, two = losses(trained / "one"), losses(trained / "two")
    assert len(one) == 30
    assert one[0] != one[29]
    # 4 images in one process, 1 in each of the four.
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert two[1] == pytest.approx(one[1], rel=1e-4)


def test_two_machines_evaluate_like_one_process(trained, job):
    checkpoint = "train.init_checkpoint=one/model_final.pth"
    finish(job("--eval-only", checkpoint, "train.output_dir=evaluated"))
    found = results(trained / "evaluated")
    assert found == results(trained / "one")
    assert found["bbox"]["AP"] >= 0


def test_a_machine_that_dies_ends_the_other_and_both_resume(trained, job):
    arguments = [*LENGTH, "train.output_dir=killed"]
    survivor, victim = job(*arguments)
    wait_for(trained / "killed" / "model_0000004.pth", survivor)
    signal_machine(victim, signal.SIGKILL)
    _, message = survivor.communicate(timeout=PATIENCE)
    assert survivor.returncode == 3, message
    assert message.startswith("fiber-d2-train: error: Another process of this job has ended")
    assert "--resume" in message
    assert message.count("\n") == 1
    assert not (trained / "killed" / "model_final.pth").exists()

    finish(job("--resume", *arguments))
    two, resumed = losses(trained / "two"), losses(trained / "killed")
    assert resumed.keys() == two.keys()
    assert list(resumed.values()) == pytest.approx(list(two.values()), rel=1e-4)
    expected = weights(trained / "two")
    for name, found in weights(trained / "killed").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def wait_for(path, process):
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_torchrun_on_two_machines(trained, job, machines):
    port = free_port()
    nodes = [
        job.start(
            *(rank, "-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", rank),
            *("--nproc-per-node", 1, "--master-addr", machines.host, "--master-port", port),
            *(TRAIN_NET, *CONFIG, "train.max_iter=2", "dataloader.test=null"),
            "train.output_dir=torchrun",
        )
        for rank in (0, 1)
    ]
    finish(nodes)
    one, found = losses(trained / "one"), losses(trained / "torchrun")
    assert found[0] == pytest.approx(one[0], rel=1e-5)


WAITING = """
import sys
from datetime import timedelta
from pathlib import Path

from detectron2.utils import comm

from fiber_d2.engine.launch import launch
from fiber_d2.engine.processes import notice_lost_contact


def work():
    with notice_lost_contact():
        while True:
            comm.synchronize()
            Path(f"at_work_{comm.get_rank()}").touch()


if __name__ == "__main__":
    rank, url = int(sys.argv[1]), sys.argv[2]
    timeout = timedelta(seconds=10)
    launch(
        work,
        num_processes=1,
        num_machines=2,
        machine_rank=rank,
        dist_url=url,
        timeout=timeout,
    )
"""


def test_a_machine_that_hangs_ends_the_other_after_the_timeout(tmp_path, machines):
    (tmp_path / "waiting.py").write_text(WAITING)
    url = machines.url()
    survivor, victim = (
        machines.start(rank, ["waiting.py", rank, url], tmp_path) for rank in (0, 1)
    )
    wait_for(tmp_path / "at_work_0", survivor)
    wait_for(tmp_path / "at_work_1", victim)
    # No connection is closed: as when a switch fails.
    signal_machine(victim, signal.SIGSTOP)
    _, message = survivor.communicate(timeout=PATIENCE)
    assert survivor.returncode == 1
    assert "LostContactError: Another process of this job has ended" in message
    assert "imed out" in message
