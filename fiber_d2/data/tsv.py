"""Objects365 as TSV files -> Detectron2 dataset dicts, made one at a time.

A small yaml names the files: ``img``, ``label`` and ``hw``, whose row ``r`` is about the same
image, and ``labelmap`` (or ``jsondict``) with the classes. It may name a ``linelist``, the rows in
the order and as often as they are to be shown, and ``imageid2idx``, which finds images by the
``img_id`` of their label row.

A file's ``rect`` counts its last pixel (it covers ``x2 - x1 + 1`` of them). Records have
Detectron2's continuous corners: what a COCO file calls ``[x, y, w, h]`` is ``[x, y, x + w - 1,
y + h - 1]`` in the TSV and ``[x, y, x + w, y + h]`` in the record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .tsv_file import (
    TSVFile,
    decode_tsv_image,
    read_integers,
    read_tsv_image,
    remember,
    tsv_image_size,
    write_tsv,
)

# May be in a label map, as the number 0; it is no class.
BACKGROUND = "__background__"

__all__ = [
    "TSVFile",
    "TSVRecords",
    "clip_inclusive",
    "decode_tsv_image",
    "load_tsv_dataset",
    "read_tsv_image",
    "write_tsv",
]


class TSVRecords(Sequence):
    """A list of dataset records that are read from disk when asked for.

    Only row numbers are held, as arrays, so it is cheap to pickle and to share among workers. Do
    not turn it into a list, nor into a serialised ``DatasetFromList``; ``MapDataset`` takes it as
    it is, and :meth:`subset` selects from it.

    A record has ``file_name`` (of the image TSV) and ``tsv_row``, from which
    :func:`read_tsv_image` reads the image; ``height`` and ``width``; ``image_id``, the key where
    that is a whole number, else the place in the data set; and ``annotations`` with ``bbox``
    (XYXY_ABS, continuous corners, within the image), ``category_id`` (from 0, in the order of the
    label map's numbers, without the background) and ``iscrowd``. Boxes that are no larger than a
    pixel in a direction, after clipping, are left out.

    Reading a record raises ValueError where a row is broken; file and row are named.

    Attributes:
        images, labels, sizes: the files; ``sizes`` is None where the images tell.
        class_names: by contiguous id.
        label_numbers: int64 (K,), the label map's number of each class.
    """

    def __init__(
        self,
        images: TSVFile,
        labels: TSVFile,
        sizes: TSVFile | None,
        *,
        class_numbers: dict[str, int],
        lines: np.ndarray | None = None,
        image_rows: _RowsById | None = None,
    ) -> None:
        self.images, self.labels, self.sizes = images, labels, sizes
        self._image_rows = image_rows
        self._rows = np.arange(len(labels)) if lines is None else lines
        self._places = np.arange(len(self._rows))
        ordered = sorted(class_numbers, key=lambda name: class_numbers[name])
        self.class_names = [name for name in ordered if name != BACKGROUND]
        self.label_numbers = np.array([class_numbers[name] for name in self.class_names], np.int64)
        self._category_of = {name: index for index, name in enumerate(self.class_names)}
        self._category_of[BACKGROUND] = -1

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.row(index)
        key, content, entries = self._label(row)
        image_row = self._image_row(row, content)
        height, width = self._size(row, image_row, key)
        rects, categories, crowds = self._objects(row, entries)
        boxes, kept = clip_inclusive(rects, height, width)
        kept &= categories >= 0
        boxes[:, 2:] += 1
        return {
            "file_name": self.images.path,
            "tsv_row": image_row,
            "height": height,
            "width": width,
            "image_id": _as_integer(key, int(self._places[index])),
            "annotations": [
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": category,
                    "iscrowd": crowd,
                }
                for box, category, crowd in zip(
                    boxes[kept].tolist(), categories[kept].tolist(), crowds[kept].tolist()
                )
            ],
        }

    def row(self, index: int) -> int:
        """The label row of a record."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} records; there is no record {index}.")
        return int(self._rows[index])

    def key(self, index: int) -> str:
        """The key of a record's image, as written in the files."""
        return self._label(self.row(index))[0]

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """All objects of a record as its file has them.

        Returns:
            Rects float64 (N, 4), inclusive corners, not clipped; contiguous ids int64 (N,), -1
            for the background.
        """
        row = self.row(index)
        return self._objects(row, self._label(row)[2])[:2]

    def image_sizes(self) -> np.ndarray:
        """Height and width of every record's image, int64 (N, 2); reads each row once."""
        rows, inverse = np.unique(self._rows, return_inverse=True)
        sizes = np.zeros((len(rows), 2), dtype=np.int64)
        for place, row in enumerate(rows.tolist()):
            key, content = "", None
            if self._image_rows is not None or self.sizes is None:
                key, content, _ = self._label(row)
            sizes[place] = self._size(row, self._image_row(row, content), key)
        return sizes[inverse]

    def subset(self, indices: Sequence[int] | np.ndarray) -> TSVRecords:
        """The records of these indices, in this order; repeats are welcome. Ids do not change."""
        chosen = object.__new__(TSVRecords)
        chosen.__dict__.update(self.__dict__)
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        chosen._rows, chosen._places = self._rows[indices], self._places[indices]
        return chosen

    def _label(self, row: int) -> tuple[str, Any, list[Any]]:
        """Key, content and objects of a label row."""
        columns = self.labels.columns(row, at_least=2)
        content = _parse_json(columns[1], self.labels, row)
        entries = content.get("objects") if isinstance(content, dict) else content
        if not isinstance(entries, list):
            raise self.labels.error(row, "is neither a list of objects nor has a list `objects`")
        return columns[0], content, entries

    def _objects(self, row: int, entries: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        file = self.labels
        try:
            rects = np.array([entry["rect"] for entry in entries], dtype=np.float64)
            names = [entry["class"] for entry in entries]
            crowds = np.array([entry.get("iscrowd", 0) for entry in entries], dtype=np.int64)
            rects = rects.reshape(len(entries), 4)
            unknown = [name for name in names if name not in self._category_of]
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            problem = "has an object without a `class` and a `rect` of four numbers"
            raise file.error(row, problem) from error
        if not np.isfinite(rects).all():
            raise file.error(row, "has a rect that is not finite")
        if unknown:
            raise file.error(row, f"has the class {unknown[0]!r}, which is not in the label map")
        categories = np.array([self._category_of[name] for name in names], dtype=np.int64)
        return rects, categories, crowds

    def _image_row(self, row: int, content: Any) -> int:
        if self._image_rows is None:
            return row
        if not isinstance(content, dict) or "img_id" not in content:
            raise self.labels.error(row, "has no `img_id`, by which imageid2idx finds its image")
        found = self._image_rows.find(str(content["img_id"]))
        if found is None:
            problem = f"has the img_id {content['img_id']!r}, which is not in imageid2idx"
            raise self.labels.error(row, problem)
        return found

    def _size(self, row: int, image_row: int, key: str) -> tuple[int, int]:
        # Rows of sizes follow the labels or the images, nobody says which, where images are
        # found by their ids: only the image itself is right then.
        if self.sizes is None or self._image_rows is not None:
            return tsv_image_size(self.images, image_row)
        columns = self.sizes.columns(row, at_least=2)
        if key and columns[0] != key:
            raise self.sizes.error(
                row, f"is about {columns[0]!r}, but that row of {self.labels.path} about {key!r}"
            )
        return _parse_size(columns[1], self.sizes, row)


class _RowsById:
    """Row numbers by id, without a Python object for each."""

    def __init__(self, rows: dict[str, int], path: str, limit: int) -> None:
        self._ids = np.array(sorted(rows), dtype=np.str_)
        self._rows = np.array([rows[key] for key in sorted(rows)], dtype=np.int64)
        if len(self._rows) and not 0 <= self._rows.min() <= self._rows.max() < limit:
            raise ValueError(f"{path} names rows beyond the {limit} rows of images.")

    def find(self, key: str) -> int | None:
        place = int(np.searchsorted(self._ids, key))
        if place < len(self._ids) and self._ids[place] == key:
            return int(self._rows[place])
        return None


def load_tsv_dataset(yaml_file: str, dataset_name: str | None = None) -> TSVRecords:
    """The records of a TSV data set.

    Args:
        yaml_file: names the files, absolute, or relative to its own folder or the current one.
        dataset_name: where given, ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` (of
            the label map's numbers) are stored in its metadata.

    Returns:
        A lazy sequence of Detectron2 records, see :class:`TSVRecords`.

    Raises:
        FileNotFoundError: the yaml, a file it names, or the index of a TSV is missing. The index
            of the labels is made where it is missing.
        ValueError: a file is not of its format, or rows do not fit each other.
    """
    config = _load_config(yaml_file)

    def find(key: str) -> str | None:
        return _find_file(config[key], yaml_file) if config.get(key) is not None else None

    image_file, label_file, size_file = find("img"), find("label"), find("hw")
    class_file = find("labelmap") or find("jsondict")
    line_file, id_file = find("linelist"), find("imageid2idx")
    if image_file is None or label_file is None or class_file is None:
        raise ValueError(f"{yaml_file} must name `img`, `label` and `labelmap` (or `jsondict`).")
    images, labels = TSVFile(image_file), TSVFile(label_file, build_index=True)
    sizes = TSVFile(size_file) if size_file is not None else None
    image_rows = _load_image_rows(id_file, len(images)) if id_file is not None else None
    for other in (images, sizes):
        if image_rows is None and other is not None and len(other) != len(labels):
            raise ValueError(
                f"{other.path} has {len(other)} rows, but {labels.path} has {len(labels)}: row by "
                "row they must be about the same images."
            )
    records = TSVRecords(
        remember(images),
        labels,
        sizes,
        class_numbers=_load_class_numbers(class_file),
        lines=_load_lines(line_file, len(labels)) if line_file is not None else None,
        image_rows=image_rows,
    )
    if dataset_name is not None:
        numbers = records.label_numbers.tolist()
        MetadataCatalog.get(dataset_name).set(
            thing_classes=records.class_names,
            thing_dataset_id_to_contiguous_id={number: k for k, number in enumerate(numbers)},
        )
    return records


def clip_inclusive(boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes whose corners are pixels that belong to them.

    Args:
        boxes: (N, 4) XYXY, inclusive.
        height, width: of the image.

    Returns:
        The boxes clipped to ``[0, width - 1]`` and ``[0, height - 1]``, and bool (N,): whether
        they are then larger than a pixel in both directions (``x2 > x1`` and ``y2 > y1``).
    """
    last = np.array([width - 1, height - 1, width - 1, height - 1], dtype=boxes.dtype)
    clipped = np.clip(boxes, 0, last)
    return clipped, (clipped[:, 2:] > clipped[:, :2]).all(axis=1)


def _load_config(yaml_file: str) -> dict[str, Any]:
    try:
        with PathManager.open(yaml_file, "r", encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The TSV data set {yaml_file} does not exist: datasets/README.md shows where data "
            "sets belong."
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{yaml_file} is not yaml: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{yaml_file} does not name files: it must hold `img`, `label`, ...")
    return config


def _find_file(name: Any, yaml_file: str) -> str:
    if not isinstance(name, str):
        raise ValueError(f"{yaml_file} must name files; it has {name!r} instead of a name.")
    places = list(dict.fromkeys([os.path.join(os.path.dirname(yaml_file), name), name]))
    for place in places:
        if PathManager.isfile(place):
            return place
    raise FileNotFoundError(f"{yaml_file} names {name}, which is not at {' or '.join(places)}.")


def _read_json(path: str) -> Any:
    try:
        with PathManager.open(path, "r", encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not json: {error}") from error


def _load_class_numbers(path: str) -> dict[str, int]:
    """Numbers of the classes of a label map: json, or a list of names counted from 1."""
    if path.endswith(".tsv"):
        with PathManager.open(path, "r", encoding="utf-8") as file:
            names = [line.rstrip("\r\n").split("\t")[0] for line in file]
        numbers: Any = {name: number for number, name in enumerate(names, 1)}
        if len(numbers) < len(names):
            raise ValueError(f"The label map {path} repeats a name.")
    else:
        numbers = _read_json(path)
        if isinstance(numbers, dict) and isinstance(numbers.get("label_to_idx"), dict):
            numbers = numbers["label_to_idx"]
    values = list(numbers.values()) if isinstance(numbers, dict) else []
    if not values or not all(type(value) is int for value in values):
        raise ValueError(f"The label map {path} must give each class name a number.")
    if len(set(values)) < len(values):
        raise ValueError(f"The label map {path} gives two classes the same number.")
    return numbers


def _load_lines(path: str, limit: int) -> np.ndarray:
    lines = read_integers(path)
    wrong = np.flatnonzero((lines < 0) | (lines >= limit))
    if len(wrong):
        raise ValueError(
            f"Entry {wrong[0]} of the line list {path} is {lines[wrong[0]]}, but the data set has "
            f"the rows 0 to {limit - 1}."
        )
    return lines


def _load_image_rows(path: str, limit: int) -> _RowsById:
    rows = _read_json(path)
    if not isinstance(rows, dict) or not all(type(row) is int for row in rows.values()):
        raise ValueError(f"{path} must give each image id the number of its row.")
    return _RowsById(rows, path, limit)


def _parse_json(text: str, file: TSVFile, row: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise file.error(row, f"has no json in its second column: {error}") from error


def _parse_size(text: str, file: TSVFile, row: int) -> tuple[int, int]:
    """Height and width from ``[{"height": H, "width": W}]``, the same without brackets, or H W."""
    try:
        if text.lstrip()[:1] in ("[", "{"):
            content = json.loads(text)
            content = content[0] if isinstance(content, list) else content
            height, width = int(content["height"]), int(content["width"])
        else:
            height, width = (int(number) for number in text.split())
        if height < 1 or width < 1:
            raise ValueError
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise file.error(row, f"does not give a height and a width: {text[:80]!r}") from error
    return height, width


def _as_integer(key: str, otherwise: int) -> int:
    try:
        return int(key)
    except ValueError:
        return otherwise
