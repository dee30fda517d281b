import atexit
import operator
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.utils import comm

from fiber_d2.engine.errors import LostContactError
from fiber_d2.engine.launch import Placement, choose_device, launch, read_placement
from fiber_d2.engine.main import build_argument_parser, choose_timeout, main
from fiber_d2.engine.overrides import load_config
from fiber_d2.engine.processes import notice_lost_contact


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("present", "requested", "num_gpus", "expected"),
    [
        (0, "cuda", 1, ("cpu", 1)),
        (0, "cuda", 0, ("cpu", 1)),
        (0, "cuda", 2, ("cpu", 2)),
        (0, "cpu", 2, ("cpu", 2)),
        (2, "cuda", 0, ("cpu", 1)),
        (2, "cuda", 1, ("cuda", 1)),
        (2, "cuda", 2, ("cuda", 2)),
        (2, "cpu", 3, ("cpu", 3)),
    ],
)
def test_device_and_number_of_processes(monkeypatch, present, requested, num_gpus, expected):
    gpus(monkeypatch, present)
    assert choose_device(requested, num_gpus) == expected


@pytest.mark.parametrize(
    ("requested", "num_gpus", "message"),
    [("cuda", 3, "has 2 GPU"), ("cuda", -1, "negative"), ("cuda:1", 1, "CUDA_VISIBLE_DEVICES")],
)
def test_requests_that_cannot_be_met(monkeypatch, requested, num_gpus, message):
    gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match=message):
        choose_device(requested, num_gpus)


def test_one_process_runs_here():
    seen = []
    launch(seen.append, num_processes=1, args=(3,))
    assert seen == [3]


def names_of_threads():
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def gather_and_tell_threads(folder):
    rank = comm.get_rank()
    found = comm.gather(rank)
    (folder / f"{rank}_while").write_text(f"{found} {names_of_threads()}")
    atexit.register(lambda: (folder / f"{rank}_end").write_text(str(names_of_threads())))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the threads' names are read from /proc")
def test_no_thread_of_a_group_outlives_it(tmp_path):
    # One that works on while the interpreter ends aborts a process that had done everything.
    launch(gather_and_tell_threads, num_processes=2, args=(tmp_path,))
    for rank, found in enumerate(("[0, 1]", "[]")):
        during = (tmp_path / f"{rank}_while").read_text()
        assert during.startswith(found) and "gloo" in during
        assert "gloo" not in (tmp_path / f"{rank}_end").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_machines": 2, "machine_rank": 2}, "--machine-rank is 2"),
        ({"num_machines": 0}, "--num-machines 0"),
        ({"num_machines": 2}, "--dist-url tcp"),
        ({"num_machines": 2, "dist_url": "node:29500"}, "--dist-url is 'node:29500'"),
        ({"dist_url": "env://"}, "--dist-url is 'env://'"),
    ],
)
def test_machines_that_do_not_fit_together(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(ValueError, match=message):
        launch(print, num_processes=1, **arguments)


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_placement_by_torchrun():
    assert read_placement(TORCHRUN) == Placement(3, 4, 1, 2)
    assert read_placement({}) is None
    # One of them alone may be there for another reason.
    assert read_placement({"WORLD_SIZE": "4"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_RANK": None, "MASTER_PORT": None}, "but LOCAL_RANK, MASTER_PORT not"),
        ({"RANK": "two"}, "not all numbers: RANK=two, WORLD_SIZE=4"),
        ({"RANK": "4"}, "do not fit together: RANK=4, WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2, LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "3"}, "same number of processes"),
    ],
)
def test_placements_that_are_none(change, message):
    given = {name: text for name, text in {**TORCHRUN, **change}.items() if text is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        read_placement(given)


@pytest.mark.parametrize(
    "options",
    [
        ["--num-gpus", "2"],
        ["--num-machines", "1"],
        ["--machine-rank", "0"],
        ["--dist-url", "tcp://10.0.0.1:29500"],
    ],
)
def test_options_that_torchrun_decides(monkeypatch, capsys, config_file, options):
    for name, text in TORCHRUN.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit) as exit:
        main(["--config-file", str(config_file), *options])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert f"but {options[0]} is given, too" in message
    assert "--nproc-per-node" in message


def test_timeout_of_the_option_or_of_the_configuration(config_file, tmp_path):
    cfg = load_config(str(config_file), [])
    assert choose_timeout(cfg, None) == timedelta(minutes=30)
    assert choose_timeout(cfg, 12.5) == timedelta(seconds=12.5)
    assert choose_timeout(load_config(str(config_file), ["train.timeout=7"]), None).seconds == 7
    with pytest.raises(ValueError, match="train.timeout is 0"):
        choose_timeout(load_config(str(config_file), ["train.timeout=0"]), None)
    (tmp_path / "plain.yaml").write_text("VERSION: 2")
    yaml = load_config(str(tmp_path / "plain.yaml"), ["FIBER.TRAIN.TIMEOUT=8"])
    assert choose_timeout(yaml, None).seconds == 8


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon"])
def test_timeouts_that_are_none(capsys, text):
    with pytest.raises(SystemExit):
        build_argument_parser().parse_args(["--dist-timeout", text])
    assert "--dist-timeout" in capsys.readouterr().err


def test_what_counts_as_lost_contact():
    gloo = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[10.0.0.2]:4321. This is typically caused by something."
    )
    for error in (gloo, torch.distributed.DistBackendError("NCCL error of a peer\nmore")):
        with pytest.raises(LostContactError) as raised, notice_lost_contact():
            try:
                raise error
            except RuntimeError as cause:
                raise RuntimeError("Training stopped at iteration 3") from cause
        assert str(raised.value).count("\n") == 0
    with pytest.raises(LostContactError) as raised, notice_lost_contact():
        raise gloo
    assert "it has (Connection closed by peer [10.0.0.2]:4321). Start" in str(raised.value)
    with pytest.raises(ZeroDivisionError), notice_lost_contact():
        operator.truediv(1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "args", "error", "message"),
    [
        (operator.truediv, (1, 0), mp.ProcessRaisedException, "ZeroDivisionError"),
        (os.abort, (), LostContactError, r"process of rank [01] was ended by SIGABRT\. Start"),
    ],
)
def test_how_processes_end(function, args, error, message):
    with pytest.raises(error, match=message):
        launch(function, num_processes=2, args=args)
