"""Ctrl-C in a program of several processes, which may hear of it more than once.

A terminal tells all processes of a program; ``kill`` and schedulers tell the first one only, which
therefore tells those it has started, whether they know already or not. Whoever was told is on its
way out: a repetition would only disturb it there, between two files or two semaphores.

A process that others start and watch goes through four stages: deaf while its modules are loaded,
when it could do nothing but die with a traceback (:func:`held_back`, around its start); dying at
once and silently while there is nothing to lose, even inside of a library that waits for other
processes (:func:`hear_and_die`); hearing once (:func:`hear_once`); and deaf again
(:func:`hear_no_more`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HAS_MASK = hasattr(signal, "pthread_sigmask")


class _Heard:
    """What this process has heard; there is one, as signals belong to a process."""

    # Whether this process was started by one that passes interrupts on.
    watched = False
    already = False


def is_repetition() -> bool:
    """For handlers of SIGINT: whether this is a second one, in a process that another one watches.

    What the user may want to say with it is the business of the process that watches.
    """
    repeated = _Heard.watched and _Heard.already
    _Heard.already = True
    return repeated


@contextmanager
def held_back() -> Iterator[None]:
    """Processes started inside do not hear SIGINT until they ask for it."""
    if not _HAS_MASK:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_and_die() -> None:
    """From now on SIGINT, one that was held back included, ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _HAS_MASK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def hear_once() -> None:
    """From now on the first SIGINT raises KeyboardInterrupt in this process, others do nothing."""
    _Heard.watched, _Heard.already = True, False
    signal.signal(signal.SIGINT, _handle)


def hear_no_more() -> None:
    """From now on SIGINT does nothing: all is done but the interpreter's farewell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _handle(number: int, frame: Any) -> None:
    if not is_repetition():
        raise KeyboardInterrupt
