import errno
import os

import pytest
from detectron2.engine import TrainerBase

from fiber_d2.engine.errors import PlainRunError, RunError, TrainingStopped
from fiber_d2.engine.trouble import name_the_iteration


def escaped(error):
    """What leaves the block where ``error`` was raised in it."""
    trainer = TrainerBase()
    trainer.iter = 4
    with pytest.raises(RunError) as caught, name_the_iteration(trainer, 10):
        raise error
    assert str(caught.value).startswith("Training stopped at iteration 4 of 10: ")
    assert caught.value.__cause__ is error
    return caught.value


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 13) is killed by signal: Killed. ",
        "DataLoader worker (pid 13) exited unexpectedly with exit code 1. Details are lost",
        "DataLoader worker (pid(s) 13, 14) exited unexpectedly",
        "DataLoader worker (pid 13) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your shared memory "
        "limit.",
    ],
)
def test_torchs_words_about_a_dead_loading_process(text):
    error = escaped(RuntimeError(text))
    assert isinstance(error, PlainRunError)
    assert "a data-loading process has ended (DataLoader worker (pid" in str(error)
    assert "13" in str(error)


def test_a_silent_loading_process():
    error = escaped(RuntimeError("DataLoader timed out after 12 seconds"))
    assert isinstance(error, PlainRunError)
    assert "gave no batch for 12 seconds" in str(error)


def test_a_full_disk_anywhere():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        raise RuntimeError("torch's own words") from full
    except RuntimeError as error:
        found = escaped(error)
    assert isinstance(found, PlainRunError)
    assert "the disk is full" in str(found)
    assert not isinstance(escaped(OSError(errno.EIO, "broken")), PlainRunError)


def test_other_errors_keep_their_type_in_words():
    error = escaped(MemoryError("too much"))
    assert not isinstance(error, PlainRunError)
    assert "MemoryError: too much" in str(error)


def test_a_training_that_was_stopped_is_no_failure(caplog):
    trainer = TrainerBase()
    trainer.iter = 7
    with caplog.at_level("INFO", "fiber_d2.engine"), name_the_iteration(trainer, 10):
        raise TrainingStopped("no better for 3 evaluations")
    assert "Training ends after iteration 7: no better for 3 evaluations" in caplog.text
