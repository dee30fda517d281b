import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import util

import pytest
import torch.multiprocessing as mp

from fiber_d2.engine import interrupts
from fiber_d2.engine.launch import launch
from fiber_d2.engine.processes import Reports, interrupt_children


@pytest.fixture
def signals(monkeypatch):
    """What a test does to signals is undone."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(interrupts._Heard, "watched", False)
    monkeypatch.setattr(interrupts._Heard, "already", False)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)


def test_a_watched_process_hears_once(signals):
    interrupts.hear_once()
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    interrupt()
    interrupts.hear_no_more()
    interrupt()


def test_others_hear_as_often_as_they_are_told(signals):
    assert [interrupts.is_repetition() for _ in range(3)] == [False] * 3
    interrupts.hear_once()
    assert [interrupts.is_repetition() for _ in range(3)] == [False, True, True]


PROGRAM = """
import os, signal, sys, time
sys.path[:0] = {path!r}
from fiber_d2.engine.interrupts import hear_and_die
print(os.getpid(), flush=True)
sys.stdin.readline()
print("deaf", flush=True)
{ask}
print("never printed", flush=True)
"""


@pytest.mark.skipif(not interrupts._HAS_MASK, reason="this system has no masks of signals")
def test_what_was_held_back_ends_a_process_when_it_asks():
    found = []
    for ask in ("hear_and_die()", ""):
        with interrupts.held_back():
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(path=sys.path, ask=ask)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("\n", timeout=60)
        found.append((process.returncode, out.split("\n")[0], "never" in out, err))
    assert found == [(-signal.SIGINT, "deaf", False, ""), (0, "deaf", True, "")]


class InterruptsItsEnd:
    """Ctrl-C comes while an object is put away."""

    def __init__(self):
        util.Finalize(self, interrupt, exitpriority=1)


def exits_with(local_rank, reports, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with reports.of(local_rank):
        kept = InterruptsItsEnd()
        assert kept
        sys.exit(code)


@pytest.mark.slow
def test_an_interrupt_of_the_farewell_changes_nothing(capfd):
    reports = Reports()
    context = mp.spawn(exits_with, nprocs=1, args=(reports, 130), join=False)
    (process,) = context.processes
    process.join(60)
    assert process.exitcode == 130
    assert capfd.readouterr().err == ""


def sleeps(deaf):
    signal.signal(signal.SIGINT, signal.SIG_IGN if deaf else signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deaf.set()
    time.sleep(600)


@pytest.mark.slow
def test_children_that_do_not_hear_end_as_well(monkeypatch):
    monkeypatch.setattr("fiber_d2.engine.processes._BATCH_SECONDS", 0.2)
    monkeypatch.setattr("fiber_d2.engine.processes._GRACE_SECONDS", 0.2)
    context = mp.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=sleeps, args=(ready,))
    process.start()
    assert ready.wait(60)
    interrupt_children()
    assert process.exitcode == -signal.SIGKILL


def tell_start_method(queue):
    queue.put(multiprocessing.get_start_method())


@pytest.mark.slow
def test_processes_start_others_as_their_parent_does():
    queue = mp.get_context("spawn").SimpleQueue()
    launch(tell_start_method, num_processes=2, args=(queue,))
    assert [queue.get(), queue.get()] == [multiprocessing.get_start_method()] * 2
