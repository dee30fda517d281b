import pytest
import torch

from fiber_d2.engine.launch import choose_device, launch


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_machines": 2, "machine_rank": 2}, "--machine-rank is 2"),
        ({"num_machines": 0}, "--num-machines 0"),
        ({"num_machines": 2}, "--dist-url tcp"),
    ],
)
def test_machines_that_do_not_fit_together(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(ValueError, match=message):
        launch(print, num_processes=1, **arguments)
