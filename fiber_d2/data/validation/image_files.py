"""Where image files are, and what reading them shows."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, Union

from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fiber_d2.data.coco_json import path_within
from fiber_d2.data.images import read_image

from .checks import Finding
from .schema import file_name_of, where
from .sources import Source, blocks

# Images per message to a worker, and messages on their way per worker.
_BATCH, _AHEAD = 16, 4
_EXIF_ORIENTATION = 0x0112
# Orientations that exchange width and height.
_TURNED = (5, 6, 7, 8)


class ImageFact(NamedTuple):
    """What reading an image file has shown.

    Attributes:
        problem: check that the file fails by itself, "" where it can be used.
        message: details of the problem.
        size: width and height as Detectron2 reads it, after the EXIF rotation.
        orientation: of the EXIF data, 1 where nothing is to be done.
        digest: of the file's bytes (of the pixels, for a row of a TSV file).
    """

    problem: str = ""
    message: str = ""
    size: tuple[int, int] | None = None
    orientation: int = 1
    digest: bytes = b""

    @property
    def stored_size(self) -> tuple[int, int] | None:
        """Width and height before the EXIF rotation."""
        return self.size[::-1] if self.size and self.orientation in _TURNED else self.size


class ImageTask(NamedTuple):
    """An image to read: a file, or a record that only the mapper can read."""

    key: Hashable
    path: str
    record: dict[str, Any] | None = None
    only_digest: bool = False


Facts = Mapping[Hashable, ImageFact]
_Keyed = list[tuple[Hashable, ImageFact]]
Located = Union[ImageTask, Finding, None]


def locate(image: dict[str, Any], source: Source) -> Located:
    """Where the image of an entry is; a finding where it may not be there, None without a name."""
    name = file_name_of(image, source)
    if name is None:
        return None
    if source.records is not None:
        row = image.get("tsv_row")
        if row is None:
            return ImageTask(name, name)
        record = {key: value for key, value in image.items() if key != "id"}
        return ImageTask((name, row), name, {**record, "image_id": image["id"]})
    root = source.image_root or ""
    if source.coco_image_root is not None and image.get("data_source") == "coco":
        root = source.coco_image_root
    path = path_within(root, name)
    if path is None:
        return Finding("image-path", f"it leads out of {root}", **where(image))
    return ImageTask(path, path)


def read_images(
    images: Iterable[dict[str, Any]],
    source: Source,
    facts: dict[Hashable, ImageFact],
    *,
    workers: int,
    only_digest: bool = False,
) -> None:
    """Read every image file once and decode it completely.

    Args:
        facts: filled while it runs, so that an interruption leaves what was read.
        workers: processes; none are started for 0.
        only_digest: read the bytes without decoding them.
    """
    tasks: dict[Hashable, ImageTask] = {}
    for image in images:
        task = locate(image, source)
        if isinstance(task, ImageTask) and task.key not in facts:
            tasks[task.key] = task._replace(only_digest=only_digest)
    workers = min(workers, -(-len(tasks) // _BATCH))
    with tqdm(total=len(tasks), desc=source.label, unit="image", disable=None) as bar:
        for keyed in _run(blocks(tasks.values(), _BATCH), workers):
            facts.update(keyed)
            bar.update(len(keyed))


def _run(batches: Iterable[list[ImageTask]], workers: int) -> Iterator[_Keyed]:
    if workers < 1:
        yield from map(_read_batch, batches)
        return
    # Forked workers need not import torch again; they only ever decode images.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    executor = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context(method), initializer=_start_worker
    )
    try:
        waiting = deque()
        for batch in batches:
            waiting.append(executor.submit(_read_batch, batch))
            if len(waiting) > workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole group; the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_batch(tasks: Sequence[ImageTask]) -> _Keyed:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, on sizes and odd metadata: found out below
        return [(task.key, read_fact(task)) for task in tasks]


def read_fact(task: ImageTask) -> ImageFact:
    """Read one image. Never raises for what may be in a file."""
    if not PathManager.isfile(task.path):  # nor a pipe, on which one would wait for ever
        return ImageFact("image-missing", f"there is no file {task.path}")
    try:
        if task.record is not None:
            pixels = read_image(task.record, "RGB")
            digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
            return ImageFact(size=(pixels.shape[1], pixels.shape[0]), digest=digest)
        with PathManager.open(task.path, "rb") as file:
            data = file.read()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if task.only_digest:
            return ImageFact(digest=digest)
        return _decode(data)._replace(digest=digest)
    except FileNotFoundError as error:
        return ImageFact("image-missing", str(error))
    except Image.DecompressionBombError as error:
        return ImageFact("image-bomb", str(error))
    except UnidentifiedImageError:
        return ImageFact("image-unreadable", "no image of a known format")
    # PIL raises nearly anything for a damaged file: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        return ImageFact("image-unreadable", f"{type(error).__name__}: {error}")


def _decode(data: bytes) -> ImageFact:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if image.mode != "RGB":
            image.convert("RGB")
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        if orientation not in range(1, 9):
            orientation = 1
        size = image.size[::-1] if orientation in _TURNED else image.size
        return ImageFact(size=size, orientation=orientation)
