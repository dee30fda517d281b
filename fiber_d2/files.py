"""Files that are never there half-written."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write that takes its place when the block ends, and never if it fails.

    Its folder is made where it is missing. Several processes and threads may write the same path;
    the last one to finish wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_json(value: Any, path: str | os.PathLike[str]) -> None:
    """Write ``value`` as JSON so that ``path`` never holds half a file."""
    with replacing(path) as file:
        # Not json.dump, whose encoder is many times slower.
        file.write(json.dumps(value).encode())
