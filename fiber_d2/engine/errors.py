"""How a run ends when something is wrong: one line for what the user can mend, all of it for us."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Raised before or at set-up with a message that says what to do: no traceback is needed.
EXPECTED_ERRORS = (ValueError, KeyError, FileNotFoundError)

USAGE_EXIT_CODE = 2
FAILURE_EXIT_CODE = 1


class RunError(RuntimeError):
    """Something broke inside the training or evaluation loop; the message says where."""


class ErrorReporter:
    """Reports the first error of this machine's processes and ends the process.

    Args:
        program: the name that messages begin with.
        first: a multiprocessing event, shared by the processes of this machine: whoever sets it
            speaks, the others (who fail because their partner is gone) stay silent.
    """

    def __init__(self, program: str, first: Any = None) -> None:
        self.program = program
        self.first = first
        self.output_dir: str | None = None

    def note_output_dir(self, output_dir: str) -> None:
        """Where ``error.log`` goes, as soon as it is known."""
        self.output_dir = str(output_dir)

    @contextmanager
    def exit_on_error(self) -> Iterator[None]:
        """Expected errors: one message, exit code 2. Others: the traceback, exit code 1."""
        try:
            yield
        except EXPECTED_ERRORS as error:
            self._report(error, expected=True)
            sys.exit(USAGE_EXIT_CODE)
        except Exception as error:
            self._report(error, expected=False)
            sys.exit(FAILURE_EXIT_CODE)

    def _report(self, error: Exception, *, expected: bool) -> None:
        if self.first is not None:
            if self.first.is_set():
                return
            self.first.set()
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
