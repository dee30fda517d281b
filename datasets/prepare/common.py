"""What the preparation scripts share: json in and out, MDETR-style files, boxes, messages."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

from tqdm import tqdm

T = TypeVar("T")
Box = list  # [x, y, width, height], pixels from the left upper corner of the image
Span = tuple  # (begin, end): characters of a caption; end is not part of it

CATEGORIES = [{"id": 1, "name": "object", "supercategory": "object"}]


def script_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the script, with the option that all of them have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--overwrite", action="store_true", help="make finished files anew")
    return parser


def run(
    work: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """The exit code of ``work(args)``; 2 and one line on stderr where the sources are at fault."""
    args = parser.parse_args(argv)
    try:
        return work(args) or 0
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def is_finished(path: Path, overwrite: bool) -> bool:
    """Whether an output is there and shall stay; says so. Outputs appear only when complete."""
    if overwrite or not path.exists():
        return False
    print(f"{path}: is there already and left alone (--overwrite makes it anew)")
    return True


def report(path: Path, counts: Mapping[str, int], left_out: Mapping[str, int]) -> None:
    """Prints the line of an output: what is in it, and what was left out for which reason."""

    def words(numbers: Mapping[str, int]) -> str:
        return ", ".join(f"{number} {name}" for name, number in numbers.items())

    missing = {name: number for name, number in left_out.items() if number}
    print(f"{path}: {words(counts)}; left out: {words(missing) or 'nothing'}")


def coco_counts(content: Mapping[str, Any]) -> dict[str, int]:
    """How many images, boxes and classes a COCO json has, for :func:`report`."""
    lists = {"images": "images", "boxes": "annotations", "classes": "categories"}
    return {what: len(content[name]) for what, name in lists.items()}


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar where somebody watches."""
    return tqdm(items, desc=what, total=total, disable=None)


def read_text(path: Path, remedy: str = "") -> str:
    """Contents of a UTF-8 file. FileNotFoundError and ValueError name it and add the remedy."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. {remedy}".rstrip())
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error


def read_json(path: Path, remedy: str = "") -> Any:
    """Contents of a json file. FileNotFoundError and ValueError name it and add the remedy."""
    text = read_text(path, remedy)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not json ({error}): fetch it again.") from error


def read_coco(path: Path, *lists: str) -> dict[str, Any]:
    """A json object with the given lists of objects, e.g. "images". ValueError where it is not."""
    content = read_json(path)
    found = content if isinstance(content, dict) else {}
    for name in lists:
        if not isinstance(found.get(name), list):
            raise ValueError(f"{path} is not such a file: it has no list {name!r}.")
        if not all(isinstance(entry, dict) for entry in found[name]):
            raise ValueError(f"{path}: an entry of {name!r} is no json object.")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a json object. The file appears when it is complete, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name: what a killed run left is overwritten by the next one.
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("{")
        for place, (key, value) in enumerate(content.items()):
            file.write(f"{',' if place else ''}\n{json.dumps(key)}: ")
            if isinstance(value, list):
                # Entry by entry: neither the slow encoder of json.dump nor all of it as one text.
                file.write("[")
                file.writelines(
                    f"{',' if i else ''}\n{json.dumps(entry)}"
                    for i, entry in enumerate(progress(value, f"{path.name} {key}"))
                )
                file.write("]")
            else:
                file.write(json.dumps(value))
        file.write("\n}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def fields(entry: Any, names: Sequence[str], where: str) -> list[Any]:
    """The named values of a json object. ValueError names what is missing, and where."""
    missing = [name for name in names if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}.")
    return [entry[name] for name in names]


def checked_box(values: Sequence[Any], where: str) -> Box:
    """Four finite numbers as they are, whole ones as int. ValueError says where there are not."""
    good = isinstance(values, (list, tuple)) and len(values) == 4
    if not (good and all(_is_number(value) for value in values)):
        raise ValueError(f"{where} has the box {values!r} instead of four numbers.")
    return [int(value) if value == int(value) else value for value in values]


def checked_size(values: Sequence[Any], where: str) -> tuple[int, int]:
    """Two whole numbers above 0. ValueError says where there are not."""
    if len(values) != 2 or not all(isinstance(value, int) and value > 0 for value in values):
        raise ValueError(f"{where} has the size {values!r} instead of two whole numbers.")
    return values[0], values[1]


def checked_text(value: Any, where: str) -> str:
    """A text with single spaces and none at its ends. ValueError says where there is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{where} has {value!r} instead of a text.")
    return " ".join(value.split())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def clip_box(box: Box, width: int, height: int) -> Box:
    """The part of a box that lies in the image; its width or height may be 0 or less."""
    x, y, w, h = box
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]


def has_extent(box: Box) -> bool:
    return box[2] > 0 and box[3] > 0


def xml_root(text: str, where: str) -> ElementTree.Element:
    """The root of an XML text. ValueError where it is damaged."""
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{where} is damaged or not XML ({error}).") from error


def xml_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Width and height of the image that an annotation XML is about; None if it does not say."""
    try:
        width, height = (int(root.findtext(f"size/{name}", "")) for name in ("width", "height"))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def join_with_spans(pieces: Sequence[str], separator: str) -> tuple[str, list[Span]]:
    """The pieces as one text, and the (begin, end) characters of each in it."""
    spans, begin = [], 0
    for piece in pieces:
        spans.append((begin, begin + len(piece)))
        begin += len(piece) + len(separator)
    return separator.join(pieces), spans


class GroundingFile:
    """An MDETR-style file in the making: each "image" is a caption about an image.

    Attributes:
        images: the captions, ids from 1.
        annotations: the boxes, ids from 1; each belongs to the caption that was added before it.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_caption(
        self, caption: str, *, file_name: str, width: int, height: int, **more: Any
    ) -> None:
        entry = {
            "id": len(self.images) + 1,
            "file_name": file_name,
            "height": height,
            "width": width,
            "caption": caption,
            "tokens_negative": [[0, len(caption)]],
        }
        self.images.append({**entry, **more})

    def add_box(self, box: Box, spans: Iterable[Span], **more: Any) -> None:
        """A box of the last caption, and the characters of all the words that name it."""
        entry = {
            "id": len(self.annotations) + 1,
            "image_id": self.images[-1]["id"],
            "category_id": 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "tokens_positive": [list(span) for span in spans],
        }
        self.annotations.append({**entry, **more})

    def write(self, path: Path) -> None:
        write_json(
            path,
            {
                "info": {"description": self.description},
                "licenses": [],
                "images": self.images,
                "annotations": self.annotations,
                "categories": CATEGORIES,
            },
        )
