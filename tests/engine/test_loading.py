import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fiber_d2.engine import loading
from fiber_d2.engine.loading import Batches


class Images(Dataset):
    """Tells the number of the process that loads, in the batch."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return torch.full((3,), os.getpid())


def test_batches_of_any_iterable():
    batches = Batches([1, 2])
    assert [batches.draw(), batches.draw()] == [1, 2]
    with pytest.raises(RuntimeError, match="has ended, but it has to be endless"):
        batches.draw()


class Unreachable(Images):
    def __getitem__(self, index):
        raise ConnectionResetError("the server of the images")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_data_is_not_taken_for_a_dead_process(num_workers):
    with pytest.raises(ConnectionResetError, match="the server of the images"):
        Batches(DataLoader(Unreachable(), num_workers=num_workers)).draw()


@pytest.mark.parametrize("timeout", [0, 1])
def test_a_process_that_is_killed(timeout):
    batches = Batches(DataLoader(Images(), num_workers=1, timeout=timeout))
    os.kill(int(batches.draw()[0, 0]), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        for _ in range(1000):
            batches.draw()


def test_a_process_that_is_stopped_while_it_hands_over(monkeypatch):
    monkeypatch.setattr(loading, "_MARGIN_SECONDS", 0.5)
    # Stopped with batches on their way, it can be caught at any point of handing one over.
    batches = Batches(DataLoader(Images(), num_workers=1, prefetch_factor=8, timeout=1))
    os.kill(int(batches.draw()[0, 0]), signal.SIGSTOP)
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        for _ in range(1000):
            batches.draw()
