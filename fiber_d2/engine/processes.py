"""Watch over the processes of this machine: which one failed, why, and how the others end."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, util
from multiprocessing.process import BaseProcess

import torch.distributed as dist
import torch.multiprocessing as mp

from .errors import FAILURE_EXIT_CODE, LOST_CONTACT_EXIT_CODE, ORDERLY_EXIT_CODES, LostContactError
from .interrupts import hear_no_more
from .rendezvous import Meeting

GO_ON = "Start the job again, on all machines, with --resume to go on from the last checkpoint."

# Looks at the other machines.
_POLL_SECONDS = 1.0
# After a failure, for the others to notice it by themselves; then once more after each signal.
_GRACE_SECONDS = 10.0
# After an interrupt, to finish the batch at work.
_BATCH_SECONDS = 60.0
# For the news of a failure to come from another machine, when contact is lost.
_NEWS_SECONDS = 5.0
# A queue takes so much without a reader.
_MAX_TEXT = 8000


@contextmanager
def notice_lost_contact() -> Iterator[None]:
    """Turn the errors of a collective operation whose partner is gone into LostContactError."""
    try:
        yield
    except Exception as error:
        cause = _find_lost_contact(error)
        if cause is None:
            raise
        raise LostContactError(
            f"Another process of this job has ended, or the network to it has "
            f"({_reason(cause)}). {GO_ON}"
        ) from error


def _find_lost_contact(error: BaseException | None) -> BaseException | None:
    """The error of a collective operation that is the cause of ``error``, or itself."""
    found = None
    while error is not None:
        # gloo's errors are plain ones, which begin with the place in its source.
        if isinstance(error, getattr(dist, "DistError", ())) or (
            isinstance(error, RuntimeError) and "gloo/" in str(error)
        ):
            found = error
        error = error.__cause__
    return found


def _reason(error: BaseException) -> str:
    """What happened, without the place in the source and advice for programmers."""
    text = str(error).strip().splitlines()[0]
    return re.sub(r"^\[\S+:\d+\] ", "", text).split(". ")[0]


class Reports:
    """What processes have to say to the one that started them, when they fail."""

    def __init__(self) -> None:
        self._queue = mp.get_context("spawn").SimpleQueue()

    @contextmanager
    def of(self, local_rank: int) -> Iterator[None]:
        """Report the exception that ends a process, and end it at once."""
        try:
            yield
        except LostContactError as error:
            self._queue.put((local_rank, "lost", str(error)[:_MAX_TEXT]))
            _leave(LOST_CONTACT_EXIT_CODE)
        except SystemExit as error:
            if error.code not in (None, 0):
                _leave(error.code if isinstance(error.code, int) else FAILURE_EXIT_CODE)
        except Exception:
            self._queue.put((local_rank, "raised", traceback.format_exc()[-_MAX_TEXT:]))
            _leave(FAILURE_EXIT_CODE)

    def read(self) -> dict[tuple[int, str], str]:
        """All there are so far, by process and kind: "lost" or "raised"."""
        found = {}
        while not self._queue.empty():
            local_rank, kind, text = self._queue.get()
            found[local_rank, kind] = text
        return found


def _leave(code: int) -> None:
    """End this process without the interpreter's farewell.

    Threads of a process group whose partner is gone can abort it, or keep it waiting.
    """
    hear_no_more()
    for child in multiprocessing.active_children():
        child.terminate()
    # The part of the farewell that waits for nobody: semaphores of loaders are given back. Python
    # would do it, too, but only with a warning on the terminal.
    util._run_finalizers(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_processes(
    processes: Sequence[BaseProcess],
    *,
    first_rank: int,
    reports: Reports,
    meeting: Meeting | None,
    timeout: timedelta,
) -> None:
    """Wait until all have ended; after a failure, of another machine as well, end them.

    Args:
        first_rank: rank of the first process.
        reports: theirs.
        meeting: with the other machines, where there are some.
        timeout: how long processes may take to end that were asked to (by a signal).

    Raises:
        LostContactError: a process was ended by a signal, another machine has failed.
        torch.multiprocessing.ProcessExitedException: a process ended with an exit code; it has
            said why.
        torch.multiprocessing.ProcessRaisedException: a process raised.
    """
    elsewhere = None
    while elsewhere is None and not any(process.exitcode for process in processes):
        running = [process.sentinel for process in processes if process.exitcode is None]
        if not running:
            break
        connection.wait(running, timeout=_POLL_SECONDS)
        if meeting is not None:
            elsewhere = meeting.failure_elsewhere()
    orderly = any(process.exitcode in ORDERLY_EXIT_CODES for process in processes)
    _join(processes, timeout.total_seconds() if orderly else _GRACE_SECONDS)
    # None of those that have to be ended.
    codes = [process.exitcode for process in processes]
    _end(processes)
    if not any(code != 0 for code in codes):
        # Even if something happened elsewhere since.
        if meeting is not None:
            meeting.leave()
        return
    found = reports.read()
    error = _find_failure(processes, codes, first_rank, found)
    if error is None:
        news = elsewhere or _await_news(meeting)
        lost = [text for (_, kind), text in found.items() if kind == "lost"]
        raise LostContactError(f"{news}. {GO_ON}" if news or not lost else lost[0])
    if meeting is not None and not _is_orderly(error):
        meeting.report_failure(_headline(error))
        meeting.leave(_NEWS_SECONDS)
    raise error


def _find_failure(
    processes: Sequence[BaseProcess],
    codes: Sequence[int | None],
    first_rank: int,
    reports: dict[tuple[int, str], str],
) -> Exception | None:
    """What went wrong on this machine; None where its processes only lost contact to others."""
    failed = [(i, p, code) for i, (p, code) in enumerate(zip(processes, codes)) if code]
    # An exit that all agreed on leaves nobody behind, but some may have noticed only the others'.
    for index, process, code in failed:
        if code in ORDERLY_EXIT_CODES:
            return _exited(index, process, code)
    for (index, kind), text in reports.items():
        if kind == "raised":
            message = f"\n\n-- Process {index} raised:\n{text}"
            return mp.ProcessRaisedException(message, index, processes[index].pid)
    for index, _, code in failed:
        if code < 0:
            name = signal.Signals(-code).name
            # Hardly anyone else sends this one.
            hint = ", as the kernel does when memory runs out" if code == -signal.SIGKILL else ""
            return LostContactError(
                f"The process of rank {first_rank + index} was ended by {name}{hint}. {GO_ON}"
            )
    for index, process, code in failed:
        if code != LOST_CONTACT_EXIT_CODE:
            return _exited(index, process, code)
    return None


def _exited(index: int, process: BaseProcess, code: int) -> mp.ProcessExitedException:
    return mp.ProcessExitedException(
        f"process {index} ended with exit code {code}",
        error_index=index,
        error_pid=process.pid,
        exit_code=code,
    )


def _is_orderly(error: Exception) -> bool:
    return getattr(error, "exit_code", None) in ORDERLY_EXIT_CODES


def _headline(error: Exception) -> str:
    """For the other machines, one line."""
    if isinstance(error, mp.ProcessExitedException):
        return "a process failed, and has said why there"
    if isinstance(error, mp.ProcessRaisedException):
        return str(error).strip().splitlines()[-1]
    return str(error).split(f". {GO_ON}")[0]


def _await_news(meeting: Meeting | None) -> str | None:
    """The failure of another machine, which may be told a little after contact is lost."""
    until = time.monotonic() + _NEWS_SECONDS
    while meeting is not None and time.monotonic() < until:
        news = meeting.failure_elsewhere()
        if news is not None:
            return news
        time.sleep(_POLL_SECONDS / 5)
    return None


def interrupt_children() -> None:
    """Pass Ctrl-C on to the processes started here, and see that they end.

    A second Ctrl-C does not wait until they have finished what they are at.
    """
    children = multiprocessing.active_children()
    try:
        for child in children:
            os.kill(child.pid, signal.SIGINT)
        _join(children, _BATCH_SECONDS)
    except KeyboardInterrupt:
        for child in children:
            child.kill()
    _end(children)


def _join(processes: Sequence[BaseProcess], seconds: float) -> None:
    """Wait for all together, at most so long."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


def _end(processes: Sequence[BaseProcess]) -> None:
    """End those that still run; a process stuck in a driver only hears SIGKILL."""
    for stop in (BaseProcess.terminate, BaseProcess.kill):
        for process in processes:
            if process.is_alive():
                stop(process)
        _join(processes, _GRACE_SECONDS)
