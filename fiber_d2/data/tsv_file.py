"""Files of tab-separated rows with a line index, as Objects365 comes to large training runs.

A ``.tsv`` is UTF-8 text, one row per line, each ended by a newline. The ``.lineidx`` beside it has
the byte at which each row starts, in decimal, one per line. Rows are read where they stand, so a
file of any size costs eight bytes of memory per row. An image is the last column of its row, the
encoded file in base64.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from fiber_d2.files import replacing

logger = logging.getLogger(__name__)

_NEWLINE = b"\n"
_CHUNK = 1 << 24
# Image files by path, so that records and images of one process share an index.
_opened: dict[str, TSVFile] = {}


class TSVFile(Sequence):
    """A ``.tsv`` whose rows are read by number, each as the list of its columns.

    Safe in forked processes and threads (reads carry their own position), and pickled as its path.

    Args:
        path: the file; its index is the file of the same name that ends in ``.lineidx``.
        build_index: make the index where there is none.

    Raises:
        FileNotFoundError: there is no such file, or no index.
        ValueError: the index is not that of the file, or the file ends within a row. What cannot
            be seen without reading the file is raised where the row is read.
    """

    def __init__(self, path: str, *, build_index: bool = False) -> None:
        self._handle: IO[bytes] | None = None
        if not PathManager.isfile(path):
            raise FileNotFoundError(f"The TSV file {path} does not exist.")
        self.path = os.path.abspath(PathManager.get_local_path(path))
        self._size = os.path.getsize(self.path)
        self._offsets = self._load_index(build_index)
        self._check_index()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> list[str]:
        return self.columns(row)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path,)

    def columns(self, row: int, at_least: int = 1) -> list[str]:
        """The columns of a row; negative numbers count from the end.

        Raises:
            IndexError: there is no such row.
            ValueError: the row is not whole, not text, or has fewer columns than ``at_least``.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows; there is no row {row}.")
        row %= len(self)
        try:
            columns = self._line(row).decode("utf-8").split("\t")
        except UnicodeDecodeError as error:
            raise self.error(row, f"is not UTF-8 text: {error}") from error
        if len(columns) < at_least:
            raise self.error(row, f"has {len(columns)} columns instead of at least {at_least}")
        return columns

    def error(self, row: int, problem: str) -> ValueError:
        """An exception that names file and row (counted from 0)."""
        return ValueError(f"Row {row} of {self.path} {problem}.")

    def _line(self, row: int) -> bytes:
        """The bytes of a row without its newline."""
        begin = int(self._offsets[row])
        end = int(self._offsets[row + 1]) if row + 1 < len(self) else self._size
        if self._handle is None:
            self._handle = open(self.path, "rb", buffering=0)
        # One byte more in front shows whether a line really starts here.
        before = min(begin, 1)
        data = os.pread(self._handle.fileno(), end - begin + before, begin - before)
        if len(data) < end - begin + before:
            raise self.error(row, "ends beyond the end of the file, which was cut since it opened")
        starts_line = not before or data.startswith(_NEWLINE)
        if not starts_line or data.find(_NEWLINE, before) != len(data) - 1:
            raise self.error(
                row,
                f"is not one line: {index_path(self.path)} is not the index of this file; delete "
                "it and have it written again (TSVFile(path, build_index=True))",
            )
        return data[before:-1]

    def _load_index(self, build_index: bool) -> np.ndarray:
        path = index_path(self.path)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return _parse_integers(file.read(), path)
        if not build_index:
            raise FileNotFoundError(
                f"The TSV file {self.path} has no index {path}: copy it from where the file came "
                "from, or have it written by TSVFile(path, build_index=True)."
            )
        offsets = _find_lines(self.path)
        try:
            with replacing(path) as file:
                _write_integers(file, offsets)
        except OSError as error:  # such as a folder that is shared read-only
            logger.warning("The index %s cannot be kept: %s", path, error)
        return offsets

    def _check_index(self) -> None:
        offsets, path = self._offsets, index_path(self.path)
        if len(offsets) == 0:
            if self._size:
                raise ValueError(f"The index {path} is empty, but {self.path} is not.")
            return
        wrong = np.flatnonzero(np.diff(offsets, prepend=-1) <= 0)
        if len(wrong) or offsets[0] != 0:
            row = int(wrong[0]) if len(wrong) and offsets[0] == 0 else 0
            raise ValueError(
                f"The index {path} must start with 0 and rise; its entry {row} is {offsets[row]}."
            )
        beyond = int(np.searchsorted(offsets, self._size))
        if beyond < len(offsets):
            raise self.error(
                beyond,
                f"starts at byte {offsets[beyond]} by {path}, but the file has {self._size} bytes: "
                "it was cut, or the index is that of another file",
            )
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != _NEWLINE:
                raise self.error(
                    len(offsets) - 1,
                    "does not end with a newline: the file was cut; fetch or write it again",
                )


def write_tsv(rows: Iterable[Sequence[str]], path: str) -> int:
    """Write rows as a ``.tsv`` with its ``.lineidx``; neither is ever there half-written.

    The index is put in place last: where it is, the file is complete.

    Returns:
        Number of rows.

    Raises:
        ValueError: a row has no column, or a column holds a tab, a newline or what UTF-8 cannot.
    """
    index = index_path(path)
    offsets = []
    with replacing(index) as index_file:
        with replacing(path) as file:
            for number, row in enumerate(rows):
                offsets.append(file.tell())
                file.write(encode_row(row, f"Row {number} for {path}"))
            # An old index must not lie beside the new file, should we be stopped in between.
            with contextlib.suppress(FileNotFoundError):
                os.remove(index)
        _write_integers(index_file, np.array(offsets, dtype=np.int64))
    return len(offsets)


def encode_row(row: Sequence[str], name: str) -> bytes:
    """One line of a ``.tsv``; ``name`` is what errors call it. Errors as of :func:`write_tsv`."""
    if len(row) == 0 or any("\t" in column or "\n" in column for column in row):
        raise ValueError(f"{name} has no column, or one with a tab or a newline in it.")
    try:
        return "\t".join(row).encode("utf-8") + _NEWLINE
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not text: {error}") from error


def decode_tsv_image(file: TSVFile, row: int, image_format: str = "BGR") -> np.ndarray:
    """The image of a row, turned as its EXIF data say, as Detectron2 does with image files.

    Args:
        file: of images.
        row: its number.
        image_format: order of the channels, ``"BGR"`` or ``"RGB"``.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        ValueError: broken base64, no image, a damaged one, or one of more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``; names file and row.
    """
    if image_format not in ("BGR", "RGB"):
        raise ValueError(f"The image format must be 'BGR' or 'RGB', not {image_format!r}.")
    with _opened_image(file, row) as image:
        return utils.convert_PIL_to_numpy(utils._apply_exif_orientation(image), image_format)


def tsv_image_size(file: TSVFile, row: int) -> tuple[int, int]:
    """Height and width of what :func:`decode_tsv_image` returns, from the image's header."""
    with _opened_image(file, row) as image:
        return turned_size(image)


def turned_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image once it is turned as its EXIF data say."""
    turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    return image.size if turned else image.size[::-1]


def read_tsv_image(record: Mapping[str, Any], image_format: str = "BGR") -> np.ndarray:
    """The image of a dataset record that has ``tsv_row``; as of :func:`decode_tsv_image`.

    Raises:
        FileNotFoundError: there is no such file, or no index.
        ValueError: as of :func:`decode_tsv_image`.
    """
    path = record["file_name"]
    file = _opened.get(path) or remember(TSVFile(path))
    return decode_tsv_image(file, record["tsv_row"], image_format)


def remember(file: TSVFile) -> TSVFile:
    """Let :func:`read_tsv_image` use this file for its path from now on; returns it."""
    _opened[file.path] = file
    return file


def read_integers(path: str) -> np.ndarray:
    """A text file of one whole number per line, as int64.

    Raises:
        FileNotFoundError, ValueError: no such file, or a line is no number.
    """
    with PathManager.open(path, "rb") as file:
        return _parse_integers(file.read(), path)


@contextlib.contextmanager
def _opened_image(file: TSVFile, row: int) -> Iterator[Image.Image]:
    """The image of a row; whatever goes wrong with it in the block is raised as ValueError."""
    text = file.columns(row, at_least=2)[-1]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise file.error(row, f"has broken base64 in its last column: {error}") from error
    try:
        image = Image.open(io.BytesIO(data))
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            # Pillow itself only warns up to twice its limit.
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        yield image
    except Image.DecompressionBombError as error:
        raise file.error(row, f"holds an image that is too large to be opened: {error}") from error
    # Pillow's readers raise about anything for damaged data.
    except Exception as error:
        problem = f"holds no image, or a damaged one: {error or type(error).__name__}"
        raise file.error(row, problem) from error


def _reopen(path: str) -> TSVFile:
    return TSVFile(path, build_index=True)


def index_path(path: str) -> str:
    return os.path.splitext(path)[0] + ".lineidx"


def _find_lines(path: str) -> np.ndarray:
    """Where the lines of a file start."""
    ends = []
    position = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE[0]) + position)
            position += len(chunk)
    starts = np.concatenate([np.zeros(1, np.int64), *ends])
    starts[1:] += 1
    return starts[starts < position]


def _parse_integers(data: bytes, path: str) -> np.ndarray:
    numbers = data.split()
    try:
        return np.array(numbers).astype(np.int64) if numbers else np.zeros(0, np.int64)
    except (ValueError, OverflowError):
        row, wrong = next((r, n) for r, n in enumerate(numbers) if not _is_int64(n))
        raise ValueError(
            f"Entry {row} of {path} is {wrong[:40]!r}, which is no whole number."
        ) from None


def _is_int64(text: bytes) -> bool:
    try:
        return -(1 << 63) <= int(text) < 1 << 63
    except ValueError:
        return False


def _write_integers(file: IO[bytes], numbers: np.ndarray) -> None:
    file.writelines(b"%d\n" % number for number in numbers.tolist())
