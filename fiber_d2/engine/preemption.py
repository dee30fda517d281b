"""SIGTERM and SIGUSR1: what programs are told before their machine is taken away.

The training finishes the iteration at work, saves, and ends with exit code 75. Schedulers send
SIGTERM with a grace time; Slurm sends whatever ``--signal`` asks for, often SIGUSR1.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

from .errors import Preempted

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GO_ON = "The same command with --resume goes on."


class _Notice:
    """What this process has heard; there is one, as signals belong to a process."""

    def __init__(self) -> None:
        self.process: int | None = None
        self.received: int | None = None
        # Whether somebody looks at `received` at moments that suit.
        self.awaited = False

    def handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:
            # A loading process that was forked hears what the whole job is told. It is needed for
            # the iteration at work; a second signal is from whoever waits for its end.
            signal.signal(number, signal.SIG_DFL)
            return
        self.received = number
        if not self.awaited:
            raise _nothing_to_save(number)


_notice = _Notice()


def _nothing_to_save(number: int) -> Preempted:
    return Preempted(f"ended by {signal.Signals(number).name}, with nothing to save. {GO_ON}")


@contextmanager
def listening() -> Iterator[None]:
    """Inside, the signals end the program with its exit code, at once or when it suits."""
    with _handling(_notice.handle):
        _notice.process, _notice.received, _notice.awaited = os.getpid(), None, False
        yield


@contextmanager
def passing_on() -> Iterator[None]:
    """For the program that starts processes: it hands the signals on, and waits for them."""

    def handle(number: int, frame: Any) -> None:
        children = multiprocessing.active_children()
        for child in children:
            os.kill(child.pid, number)
        if not children:
            raise _nothing_to_save(number)

    with _handling(handle):
        yield


@contextmanager
def _handling(handle: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals.
        yield
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def awaited() -> Iterator[None]:
    """Inside, signals are only noted: somebody calls :func:`end_if_preempted` now and then."""
    before, _notice.awaited = _notice.awaited, True
    try:
        yield
    finally:
        _notice.awaited = before


def end_if_preempted(message: str) -> None:
    """For loops that have nothing to save, or have saved it: end here if a signal has come.

    Raises:
        Preempted: with ``message``.
    """
    if _notice.received is not None:
        raise Preempted(f"ended by {signal.Signals(_notice.received).name}. {message}")


class PreemptionHook(HookBase):
    """Saves and ends the training after a signal to any of its processes, in all of them.

    Processes have to agree on the iteration after which they end, though the signal reaches them
    at different times or reaches one only. After each step they begin to exchange a flag over a
    group of their own, on CPUs, and read the answer after the next step: by then it has long
    come, so nobody waits, and all read the same. Whoever heard the signal in step i thus ends
    after step i + 1. A blocking exchange is made only where the training pauses anyway, before an
    evaluation, which may be long.

    Args:
        save: writes a checkpoint and returns its path; called in all processes.
        pauses: whether an evaluation comes after that iteration (0-based).
    """

    def __init__(self, save: Callable[[], str], pauses: Callable[[int], bool]) -> None:
        self.save = save
        self.pauses = pauses
        self._group: Any = None
        self._flag: torch.Tensor | None = None
        self._exchange: Any = None

    def before_train(self) -> None:
        if comm.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        _notice.awaited = True

    def after_step(self) -> None:
        if self.trainer.iter + 1 >= self.trainer.max_iter or not self._all_agree():
            return
        path = self.save()
        comm.synchronize()
        raise Preempted(
            f"ended by a signal after iteration {self.trainer.iter}; everything is saved in "
            f"{path}. {GO_ON}"
        )

    def _all_agree(self) -> bool:
        if self._group is None:
            return _notice.received is not None
        if self._answer():
            return True
        self._flag = torch.tensor([float(_notice.received is not None)])
        self._exchange = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return self.pauses(self.trainer.iter) and self._answer()

    def _answer(self) -> bool:
        """What the exchange under way says; False where there is none."""
        if self._exchange is None:
            return False
        self._exchange.wait()
        self._exchange = None
        return bool(self._flag.item())

    def after_train(self) -> None:
        _notice.awaited = False
        if self.trainer.iter == self.trainer.max_iter:
            self._answer()
