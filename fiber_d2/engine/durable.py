"""Files that are whole or absent, and of which it is known that they can be read back."""

from __future__ import annotations

import errno
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch

from .errors import PlainRunError

logger = logging.getLogger(__name__)

# No space, over the quota, larger than files may be.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ATTEMPTS = 2


class DamagedFileError(ValueError):
    """A file does not hold what was written to it."""


def write_atomically(
    path: str,
    write: Callable[[IO[bytes]], Any],
    *,
    check: Callable[[str], Any] | None = None,
) -> None:
    """Let ``write`` fill a file beside ``path`` and put it in place when it is safely on disk.

    Whoever reads ``path`` meanwhile, or after a crash, finds the old file or the new one, whole.

    Args:
        check: called with the path of the file beside, before it takes its place; what it raises
            leaves the old file there.

    Raises:
        PlainRunError: the disk is full.
    """
    folder = os.path.dirname(os.path.abspath(path))
    # A fixed name: what a killed process left is overwritten by the next attempt.
    temporary = path + ".tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        full = find_disk_full(error)
        if full is not None:
            raise PlainRunError(
                f"{path} cannot be written: {os.strerror(full.errno)}. What was there before is "
                "as it was. Make room, or choose another output folder."
            ) from error
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """The renaming itself must survive a power cut, too."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: str, content: Any) -> None:
    """Write ``content`` for programs and for people, atomically.

    Raises:
        PlainRunError: the disk is full.
    """
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_verified(data: dict[str, Any], path: str) -> None:
    """``torch.save`` to a file that takes its place only after it was read back and compared.

    torch stores a checksum of every tensor, taken in memory, but does not look at it in reading.

    Raises:
        PlainRunError: the disk is full, or does not give back what is written to it.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            write_atomically(path, lambda file: torch.save(data, file), check=check_checkpoint)
            return
        except DamagedFileError as error:
            if attempt == _ATTEMPTS:
                raise PlainRunError(
                    f"{path} was written {_ATTEMPTS} times and is damaged each time ({error}): "
                    "the disk is failing. What was there before is as it was."
                ) from error
            logger.warning("%s is damaged, it is written once more: %s", path, error)


def check_checkpoint(path: str) -> None:
    """Read a file of ``torch.save`` and compare the checksums it holds.

    Raises:
        DamagedFileError: it is cut off, or a part of it has changed.
    """
    try:
        with open(path, "rb") as file:
            if hasattr(os, "posix_fadvise"):
                # Read from the disk, not what the system remembers of it.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise DamagedFileError(f"{os.path.basename(path)}: {error}") from error
    if damaged is not None:
        raise DamagedFileError(f"{os.path.basename(path)}: the checksum of {damaged} differs")


def find_disk_full(error: BaseException | None) -> OSError | None:
    """The error of the operating system among the causes of ``error``; torch hides it."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return cause
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
