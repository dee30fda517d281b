"""One prediction at a time, a few that wait, and a plain answer for the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


class BusyError(RuntimeError):
    """No place is free, or none came in time: try again."""


class TooSlowError(RuntimeError):
    """The job has begun, but did not end in time."""


class GoneError(RuntimeError):
    """Whoever asked has left meanwhile, and the job was not begun."""


class Turns:
    """Runs jobs one after another in a thread of its own.

    Args:
        waiting: jobs that may wait while one runs.
        timeout: seconds from asking to the result.
    """

    def __init__(self, waiting: int, timeout: float) -> None:
        self.timeout = timeout
        self._places = threading.Semaphore(1 + waiting)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predictions")

    def run(self, job: Callable[[], T], *, is_gone: Callable[[], bool] = lambda: False) -> T:
        """The result of the job, or the exception that it raised.

        Args:
            job: a job that has begun cannot be stopped: when its time is up it keeps its turn until
                it ends, and its result is lost.
            is_gone: asked before the job begins.

        Raises:
            BusyError, TooSlowError, GoneError: there is no result.
        """
        if not self._places.acquire(blocking=False):
            raise BusyError("Others are being served and all places in the queue are taken.")

        def begin() -> T:
            if is_gone():
                raise GoneError("The visitor has left.")
            return job()

        future = self._thread.submit(begin)
        # Also where it is cancelled; a job past its time still takes up its place.
        future.add_done_callback(lambda _: self._places.release())
        wait([future], self.timeout)
        if future.done():
            return future.result()
        if future.cancel():
            raise BusyError(f"Others were being served for {self.timeout:g} seconds.")
        raise TooSlowError(f"The model needed longer than {self.timeout:g} seconds.")

    def close(self) -> None:
        """Wait for the job that runs; those that wait are not begun."""
        self._thread.shutdown(wait=True, cancel_futures=True)
