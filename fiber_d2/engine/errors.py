"""How a run ends when something is wrong: one line for what the user can mend, all of it for us."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Raised before or at set-up with a message that says what to do: no traceback is needed.
EXPECTED_ERRORS = (ValueError, KeyError, FileNotFoundError)

USAGE_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1
# Another machine or process is gone; the same command with --resume goes on.
LOST_CONTACT_EXIT_CODE = 3
# The machine was taken away (SIGTERM, SIGUSR1) and all is saved: sysexits.h calls it a temporary
# failure; the same command with --resume goes on.
PREEMPTED_EXIT_CODE = 75
# What shells report of a program that Ctrl-C ended.
INTERRUPTED_EXIT_CODE = 130
# All processes end with these together, after what they were at.
ORDERLY_EXIT_CODES = (INTERRUPTED_EXIT_CODE, PREEMPTED_EXIT_CODE)


class RunError(RuntimeError):
    """Something broke inside the training or evaluation loop; the message says where."""


class PlainRunError(RunError):
    """A run was ended by something outside of the program: the message is all one needs."""


class NonFiniteError(PlainRunError, FloatingPointError):
    """Losses or gradients were not finite in too many steps in a row."""


class TrainingStopped(BaseException):
    """Ends a training before its last iteration, which is no failure.

    Like ``KeyboardInterrupt`` it is no ``Exception``: those are logged as errors on their way out
    of Detectron2's loop.
    """


class Preempted(SystemExit):
    """A signal announced the end of this machine's time, and the program ends before that.

    Args:
        message: what is saved, in words.
    """

    def __init__(self, message: str) -> None:
        super().__init__(PREEMPTED_EXIT_CODE)
        self.message = message


class LostContactError(RuntimeError):
    """Processes of a job did not come together, or one of them is gone; the message says which."""


class ErrorReporter:
    """Reports the first error of this machine's processes and ends the process.

    Args:
        program: the name that messages begin with.
        first: a multiprocessing semaphore of 1, shared by the processes of this machine: whoever
            gets it speaks, the others (who fail because their partner is gone) stay silent.
    """

    def __init__(self, program: str, first: Any = None) -> None:
        self.program = program
        self.first = first
        self.output_dir: str | None = None

    def note_output_dir(self, output_dir: str) -> None:
        """Where ``error.log`` goes, as soon as it is known."""
        self.output_dir = str(output_dir)

    @contextmanager
    def exit_on_error(self, *, outermost: bool = True) -> Iterator[None]:
        """Expected errors: one message, exit code 2. Others: the traceback, exit code 1.

        Lost contact: one message, exit code 3. What came from outside (PlainRunError): one
        message, exit code 1. Pre-emption: one message, exit code 75.

        Args:
            outermost: False hands lost contact on, to whoever knows more of the other processes.
        """
        try:
            yield
        except LostContactError as error:
            if not outermost:
                raise
            self._report(error, expected=True)
            sys.exit(LOST_CONTACT_EXIT_CODE)
        except Preempted as error:
            if self.is_first():
                sys.stderr.write(f"{self.program}: {error.message}\n")
                sys.stderr.flush()
            raise
        except PlainRunError as error:
            self._report(error, expected=True)
            sys.exit(FAILURE_EXIT_CODE)
        except EXPECTED_ERRORS as error:
            self._report(error, expected=True)
            sys.exit(USAGE_EXIT_CODE)
        except Exception as error:
            self._report(error, expected=False)
            sys.exit(FAILURE_EXIT_CODE)

    def is_first(self) -> bool:
        """Whether no process of this machine has spoken yet; from now on one has.

        Processes that end together ask at the same moment: only one of them gets a yes.
        """
        return self.first is None or self.first.acquire(block=False)

    def _report(self, error: Exception, *, expected: bool) -> None:
        if not self.is_first():
            return
        details = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        where = self._write(details)
        if not expected or os.environ.get("FIBER_TRACEBACK") == "1":
            sys.stderr.write(details)
        if expected:
            hint = f" (traceback: {where})" if where else ""
            sys.stderr.write(f"{self.program}: error: {message_of(error)}{hint}\n")
        sys.stderr.flush()

    def _write(self, details: str) -> str | None:
        if not self.output_dir:
            return None
        path = os.path.join(self.output_dir, "error.log")
        try:
            os.makedirs(self.output_dir, exist_ok=True)
            with open(path, "w") as file:
                file.write(details)
        except OSError as error:
            sys.stderr.write(f"{self.program}: cannot write {path}: {error}\n")
            return None
        return path


def message_of(error: BaseException) -> str:
    """The text of an error; ``str(KeyError)`` would show it quoted, with escapes."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error) or type(error).__name__


def exit_status_of(
    work: Callable[[], int], prefix: str = "", interrupted: int = INTERRUPTED_EXIT_CODE
) -> int:
    """What the work of a command returns; an expected error is one line on standard error, behind
    ``prefix``, and status 2, Ctrl-C the status ``interrupted``."""
    try:
        return work()
    except (*EXPECTED_ERRORS, OSError) as error:
        sys.stderr.write(f"{prefix}error: {message_of(error)}\n")
        return USAGE_EXIT_CODE
    except KeyboardInterrupt:
        return interrupted
