"""Batches of the training loader, for which nobody waits for ever."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterable
from typing import Any

# For the loader itself to notice first.
_MARGIN_SECONDS = 5.0


class Batches:
    """Draws from a loader, at most its ``timeout`` long.

    torch's loader notices by itself that a process of its has died, or has sent nothing for
    ``timeout`` seconds. It does not notice one that stops responding while it hands over a batch:
    that one is killed here, which the loader does notice.

    Args:
        loader: iterable; one with a positive ``timeout`` in seconds is watched.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._batches = iter(loader)
        self._timeout = float(getattr(loader, "timeout", 0))
        self._has_processes = getattr(loader, "num_workers", 0) > 0
        self._gave_up = False

    def draw(self) -> Any:
        """The next batch.

        Raises:
            RuntimeError: there is none, or a loading process is dead or silent, in torch's words.
        """
        if self._timeout <= 0:
            return self._next()
        watch = threading.Timer(self._timeout + _MARGIN_SECONDS, self._give_up)
        watch.daemon = True
        watch.start()
        try:
            return self._next()
        except Exception as error:
            if self._gave_up:
                raise RuntimeError(
                    f"DataLoader timed out after {self._timeout:g} seconds"
                ) from error
            raise
        finally:
            watch.cancel()

    def _next(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            raise RuntimeError("the training loader has ended, but it has to be endless") from None
        except (ConnectionError, EOFError) as error:
            # What a process raises in loading comes with these words, its death without.
            if not self._has_processes or "in DataLoader worker process" in str(error):
                raise
            # torch's handler of the signal that tells its death raises a better error, wherever
            # the program is by then: let it be here.
            time.sleep(_MARGIN_SECONDS)
            raise RuntimeError(
                f"DataLoader worker (pid unknown) exited while it handed over a batch: {error}"
            ) from error

    def _give_up(self) -> None:
        self._gave_up = True
        # A training process has no other children while it waits for a batch.
        for child in multiprocessing.active_children():
            child.kill()
