"""One at a time, a few who wait, and the rest told so."""

import threading
import time

import pytest

from fiber_d2.demo.turns import BusyError, GoneError, TooSlowError, Turns

LONG = 60.0  # of machines that are busy; no test waits for it


class Job:
    """Runs until it is let go."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.go.wait(LONG)
        return "done"


@pytest.fixture
def in_thread():
    """``in_thread(function) -> list`` that the result or the exception comes into."""
    threads = []

    def start(function):
        results = []

        def run():
            try:
                results.append(function())
            except Exception as error:
                results.append(error)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return threads[-1], results

    yield start
    for thread in threads:
        thread.join(LONG)


def result(started):
    thread, results = started
    thread.join(LONG)
    return results[0]


def test_one_runs_one_waits_and_the_third_is_told(in_thread):
    turns = Turns(waiting=1, timeout=LONG)
    first, order = Job(), []
    one = in_thread(lambda: turns.run(first))
    assert first.begun.wait(LONG)
    two = in_thread(lambda: turns.run(lambda: order.append("second") or "second"))
    while turns._places._value:  # until it has its place
        time.sleep(0.01)
    with pytest.raises(BusyError, match="all places"):
        turns.run(lambda: "third")
    assert not order  # one at a time
    first.go.set()
    assert result(one) == "done" and result(two) == "second"
    assert turns.run(lambda: "later") == "later"
    turns.close()


def test_a_slow_job_keeps_its_turn_and_those_behind_it_are_told(in_thread):
    turns = Turns(waiting=1, timeout=0.05)
    slow, second = Job(), []
    with pytest.raises(TooSlowError, match="longer than 0.05 seconds"):
        turns.run(slow)
    with pytest.raises(BusyError, match="for 0.05 seconds"):
        turns.run(lambda: second.append(1))
    slow.go.set()
    turns.timeout = LONG
    while True:  # a place is given back a moment after the job has ended
        try:
            assert turns.run(lambda: "next") == "next"
            break
        except BusyError:
            time.sleep(0.01)
    assert not second
    turns.close()


def test_failures_are_the_caller_s_and_cost_no_place():
    turns = Turns(waiting=0, timeout=LONG)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            turns.run(lambda: 1 / 0)
    with pytest.raises(GoneError):
        turns.run(lambda: pytest.fail("nobody waits for it"), is_gone=lambda: True)
    assert turns.run(lambda: 1) == 1
    turns.close()
