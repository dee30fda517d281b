"""COCO-format json with its images -> TSV files, and back.

    python datasets/objects365_tsv.py to-tsv --json datasets/objects365/annotations/train.json \\
        --image-root datasets/objects365/images/train --output datasets/objects365/tsv \\
        [--name train] [--cas 2000] [--workers 8] [--skip-missing]
    python datasets/objects365_tsv.py to-json --yaml datasets/objects365/tsv/train.yaml \\
        --json restored.json [--image-root restored_images] [--workers 8]

to-tsv writes into the output folder

    train.img.tsv          image id, file name, the image file in base64
    train.label.tsv        image id, list of objects: class and rect (x1, y1, x2, y2; a box of
                           x, y, w, h ends at x + w - 1, y + h - 1)
    train.hw.tsv           image id, height and width
    train.labelmap.json    class names and their numbers, from 1 in the order of the file
    train.categories.json  the classes with their ids in the json
    train.yaml             names them all; written when everything else is complete

each .tsv with its .lineidx, for images in ascending order of ids. With --cas N in addition a list
of rows in which every class is seen about N times, rows of rare classes repeated, and a yaml that
uses it: train.linelist.cas2000.tsv and train.cas2000.yaml.

to-json gives back the same boxes and classes to the last digit, and with --image-root the same
image files. A TSV that was made elsewhere has no file names; its images are called by their keys.

Both can be stopped and started again: what is finished is kept, images that were written included.
to-tsv holds the json in memory, several times its size.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Context, Decimal
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import yaml
from detectron2.data import MetadataCatalog
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fiber_d2.data.readers import load_detection_json  # noqa: E402
from fiber_d2.data.resampling import class_aware_lines, image_classes  # noqa: E402
from fiber_d2.data.tsv import TSVFile, TSVRecords, load_tsv_dataset, write_tsv  # noqa: E402
from fiber_d2.data.tsv_file import encode_row, index_path, turned_size  # noqa: E402
from fiber_d2.files import replacing  # noqa: E402

T = TypeVar("T")
Record = dict[str, Any]

# Enough digits for sums of any two numbers that json holds: corners go back to sizes exactly.
EXACT = Context(prec=800)
# What the files of a data set are called after its name.
PARTS = re.compile(
    r"(img|label|hw)\.(tsv|lineidx)(\.partial)?|linelist\.cas\d+\.tsv|(labelmap|categories)\.json"
    r"|(cas\d+\.)?yaml"
)
# Images that are read ahead.
WINDOW = 256


class Parser(argparse.ArgumentParser):
    """Errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = Parser(add_help=False)
    common.add_argument("--workers", type=int, default=4, help="threads that read or write images")
    common.add_argument("--overwrite", action="store_true", help="make finished files anew")
    one = commands.add_parser("to-tsv", parents=[common], help="json and images -> TSV")
    one.add_argument("--json", type=Path, required=True)
    one.add_argument("--image-root", type=Path, required=True)
    one.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    one.add_argument("--name", default="train", help="first part of the files' names")
    one.add_argument("--cas", type=int, metavar="N", help="add a class-aware list of rows")
    one.add_argument("--seed", type=int, default=0, help="of the class-aware list")
    one.add_argument("--skip-missing", action="store_true", help="leave out images without a file")
    two = commands.add_parser("to-json", parents=[common], help="TSV -> json and images")
    two.add_argument("--yaml", type=Path, required=True)
    two.add_argument("--json", type=Path, required=True)
    two.add_argument("--image-root", type=Path, help="write the image files there")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    try:
        (to_tsv if args.command == "to-tsv" else to_json)(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def to_tsv(args: argparse.Namespace) -> None:
    """The files of one data set; see the head of this file."""
    root, prefix = str(args.image_root), str(args.output / args.name)
    if Path(args.name).name != args.name:
        raise ValueError(f"--name must be the first part of a file name, not {args.name!r}.")
    if args.cas is not None and args.cas < 1:
        raise ValueError(f"--cas must be at least 1, it is {args.cas}.")
    source = f"objects365_tsv:{args.json}"
    records = load_detection_json(str(args.json), root, source)
    metadata = MetadataCatalog.get(source)
    names, ids = metadata.thing_classes, metadata.thing_dataset_id_to_contiguous_id
    MetadataCatalog.remove(source)
    if len(set(names)) < len(names):
        raise ValueError(f"{args.json} gives two classes one name; a TSV cannot tell them apart.")
    if args.skip_missing:
        present = [r for r in _bar(records, "looking for images") if _is_file(r)]
        print(f"{len(records) - len(present)} images without a file are left out")
        records = present
    args.output.mkdir(parents=True, exist_ok=True)
    _check_source(args, records, f"{prefix}.source.json")

    if not _is_finished(f"{prefix}.label.tsv"):
        rows = ([str(r["image_id"]), _objects(r, names)] for r in _bar(records, "labels"))
        write_tsv(rows, f"{prefix}.label.tsv")
    if not _is_finished(f"{prefix}.hw.tsv"):
        rows = ([str(r["image_id"]), _size(r)] for r in _bar(records, "sizes"))
        write_tsv(rows, f"{prefix}.hw.tsv")
    if not _is_finished(f"{prefix}.img.tsv"):
        write_images(records, root, f"{prefix}.img.tsv", args.workers)
    _write_json(f"{prefix}.labelmap.json", {name: k for k, name in enumerate(names, 1)})
    _write_json(f"{prefix}.categories.json", [{"id": i, "name": names[k]} for i, k in ids.items()])
    parts = {"img": "img.tsv", "label": "label.tsv", "hw": "hw.tsv", "labelmap": "labelmap.json"}
    parts["categories"] = "categories.json"
    config = {key: f"{args.name}.{end}" for key, end in parts.items()}
    _write_text(f"{prefix}.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    if args.cas is not None:
        lines = class_aware_lines(image_classes(records), args.cas, seed=args.seed)
        line_file = f"linelist.cas{args.cas}.tsv"
        _write_text(f"{prefix}.{line_file}", "".join(f"{line}\n" for line in lines.tolist()))
        config["linelist"] = f"{args.name}.{line_file}"
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        _write_text(f"{prefix}.cas{args.cas}.yaml", text)
    print(f"{prefix}.yaml: {len(records)} images, {len(names)} classes")


def _check_source(args: argparse.Namespace, records: Sequence[Record], path: str) -> None:
    """Note what the files are made of; those of something else are neither kept nor mixed in."""
    digest = hashlib.sha256()
    with open(args.json, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    for record in records:
        digest.update(f"\n{record['image_id']}".encode())
    source = {"format": 1, "images": len(records), "sha256": digest.hexdigest()}
    if os.path.exists(path):
        with contextlib.suppress(ValueError), open(path, encoding="utf-8") as file:
            if json.load(file) == source and not args.overwrite:
                return
        if not args.overwrite:
            raise ValueError(
                f"{path} says that the files there were made of other annotations or images: "
                "choose another --output or --name, or replace them with --overwrite."
            )
    for old in args.output.iterdir():
        if old.name.startswith(f"{args.name}.") and PARTS.fullmatch(old.name[len(args.name) + 1 :]):
            old.unlink()
    _write_json(path, source)


def _is_finished(path: str) -> bool:
    if os.path.exists(path) and os.path.exists(index_path(path)):
        print(f"{path}: is there already and left alone")
        return True
    return False


def _objects(record: Record, names: Sequence[str]) -> str:
    """The label of an image. Sums are exact: numbers are added in decimal, as they are written."""
    objects = []
    for entry in record["annotations"]:
        x, y, w, h = (Decimal(repr(number)) for number in entry["bbox"])
        rect = [x, y, *(EXACT.subtract(EXACT.add(a, s), 1) for a, s in ((x, w), (y, h)))]
        crowd = ', "iscrowd": 1' if entry["iscrowd"] else ""
        name = json.dumps(names[entry["category_id"]], ensure_ascii=False)
        objects.append(f'{{"class": {name}, "rect": [{_numbers(rect)}]{crowd}}}')
    return f"[{', '.join(objects)}]"


def _size(record: Record) -> str:
    return json.dumps([{"height": record["height"], "width": record["width"]}])


def write_images(records: Sequence[Record], root: str, path: str, workers: int) -> None:
    """Write the images, going on after those that an earlier run wrote."""
    partial, partial_index = f"{path}.partial", f"{index_path(path)}.partial"
    if os.path.exists(index_path(path)) and os.path.exists(partial):
        os.replace(partial, path)  # stopped between the last two steps
        return
    done = _keep_whole_rows(partial, partial_index)

    def row_of(record: Record) -> bytes:
        name = os.path.relpath(record["file_name"], root)
        row = [str(record["image_id"]), name, _encoded_image(record)]
        return encode_row(row, f"The image {record['image_id']!r} ({name})")

    with open(partial, "ab") as file, open(partial_index, "ab") as index_file:
        rows = _in_threads(row_of, records[done:], workers)
        for row in tqdm(rows, "images", len(records), initial=done, disable=None):
            start = file.tell()
            file.write(row)
            # The index follows the data, so that every row in it but the last is whole.
            file.flush()
            index_file.write(b"%d\n" % start)
            index_file.flush()
        os.fsync(file.fileno())
    os.replace(partial_index, index_path(path))
    os.replace(partial, path)


def _keep_whole_rows(partial: str, partial_index: str) -> int:
    """Cut what an interrupted run left to its complete rows; the number of those."""
    if not (os.path.exists(partial) and os.path.exists(partial_index)):
        for path in (partial, partial_index):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        return 0
    with open(partial_index, "rb+") as index_file, open(partial, "rb+") as file:
        lines = index_file.read().split(b"\n")[:-1]
        offsets = [int(line) for line in lines]
        done = max(len(offsets) - 1, 0)
        end = offsets[done] if offsets else 0
        file.seek(max(end - 1, 0))
        if end and file.read(1) != b"\n":
            done = end = 0
        index_file.truncate(sum(len(line) + 1 for line in lines[:done]))
        file.truncate(end)
    return done


def _encoded_image(record: Record) -> str:
    path = record["file_name"]
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The image {path} does not exist: check --image-root, or leave such images out with "
            "--skip-missing."
        ) from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            height, width = turned_size(image)
    except Exception as error:  # Pillow's readers raise about anything for damaged files
        raise ValueError(f"The image {path} cannot be read: {error}") from error
    if (height, width) != (record["height"], record["width"]):
        raise ValueError(
            f"The image {path} has {width} x {height} pixels, but the json says "
            f"{record['width']} x {record['height']}."
        )
    return base64.b64encode(data).decode("ascii")


def to_json(args: argparse.Namespace) -> None:
    """The json, and the images where asked for; see the head of this file."""
    if args.json.exists() and not args.overwrite:
        print(f"{args.json}: is there already and left alone (--overwrite makes it anew)")
        return
    records = load_tsv_dataset(str(args.yaml))
    # A line list repeats and leaves out rows; the json has each row that it names once.
    rows = [records.row(index) for index in range(len(records))]
    records = records.subset(np.unique(rows, return_index=True)[1])
    categories = _categories(args.yaml, records)
    image_ids = _image_ids([records.key(index) for index in range(len(records))])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with replacing(str(args.json)) as file:
        file.write(b'{"images": [')
        seen: set[str] = set()
        write = _ImageWriter(records, image_ids, args.image_root)
        entries = _in_threads(write, range(len(records)), args.workers)
        for place, entry in enumerate(tqdm(entries, "images", len(records), disable=None)):
            if entry["file_name"] in seen:
                raise ValueError(f"Two images of {args.yaml} would be {entry['file_name']}.")
            seen.add(entry["file_name"])
            file.write(f"{',' if place else ''}\n{json.dumps(entry)}".encode())
        file.write(b'],\n"annotations": [')
        number = 0
        for index in _bar(range(len(records)), "boxes"):
            for text in _annotations(records, index, categories):
                number += 1
                head = f'{{"id": {number}, "image_id": {image_ids[index]}, '
                file.write(f"{',' if number > 1 else ''}\n{head}{text}".encode())
        file.write(f'],\n"categories": {json.dumps(categories)}}}\n'.encode())
    print(f"{args.json}: {len(records)} images, {number} boxes, {len(categories)} classes")


def _annotations(records: TSVRecords, index: int, categories: Sequence[Record]) -> Iterator[str]:
    """The json of each box of an image, from its category on."""
    _, classes = records.objects(index)  # checks the row, too
    content = json.loads(records.labels[records.row(index)][1], parse_float=Decimal)
    entries = content["objects"] if isinstance(content, dict) else content
    for entry, category in zip(entries, classes.tolist()):
        if category < 0:
            continue
        x1, y1, x2, y2 = (Decimal(number) for number in entry["rect"])
        width, height = (
            EXACT.add(EXACT.subtract(high, low), 1) for low, high in ((x1, x2), (y1, y2))
        )
        bbox, area = _numbers([x1, y1, width, height]), float(width) * float(height)
        yield (
            f'"category_id": {categories[category]["id"]}, "bbox": [{bbox}], "area": {area!r}, '
            f'"iscrowd": {int(entry.get("iscrowd", 0))}}}'
        )


class _ImageWriter:
    """Makes the json's entry of an image, and its file where a folder is given."""

    def __init__(self, records: TSVRecords, ids: Sequence[int], root: Path | None) -> None:
        self.records, self.ids, self.root = records, ids, root

    def __call__(self, index: int) -> Record:
        record = self.records[index]
        file, row = self.records.images, record["tsv_row"]
        columns = file.columns(row, at_least=2)
        name = columns[1] if len(columns) > 2 and _is_image_name(columns[1]) else None
        data = None
        if name is None or self.root is not None:
            data = _decode(file, row, columns[-1])
        if name is None:
            name = columns[0].replace("/", "_") + _extension(file, row, data)
        name = os.path.normpath(name)
        if os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
            raise file.error(row, f"has the file name {name!r}, which leads out of the folder")
        # Files appear when they are complete: what is there need not be written again.
        if self.root is not None and not (self.root / name).exists():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(str(self.root / name)) as target:
                target.write(data)
        sizes = {key: record[key] for key in ("height", "width")}
        return {"id": self.ids[index], "file_name": name, **sizes}


def _is_image_name(text: str) -> bool:
    return os.path.splitext(text)[1].lower() in Image.registered_extensions()


def _decode(file: TSVFile, row: int, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise file.error(row, f"has broken base64 in its last column: {error}") from error


def _extension(file: TSVFile, row: int, data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ".jpg" if image.format == "JPEG" else f".{image.format.lower()}"
    except Exception as error:
        raise file.error(row, f"holds no image, or a damaged one: {error}") from error


def _image_ids(keys: Sequence[str]) -> list[int]:
    """The keys where they are whole numbers; the others get the numbers after the largest."""
    ids: dict[str, int] = {}
    for key in keys:
        with contextlib.suppress(ValueError):
            ids[key] = int(key)
    if len(set(ids.values())) < len(ids) or len(set(keys)) < len(keys):
        twice = Counter([*ids.values(), *keys]).most_common(1)[0][0]
        raise ValueError(f"Two images have the key {twice}: in a json, ids must differ.")
    after = max(ids.values(), default=0) + 1
    others = (key for key in keys if key not in ids)
    ids.update({key: number for number, key in enumerate(others, after)})
    return [ids[key] for key in keys]


def _categories(yaml_file: Path, records: TSVRecords) -> list[Record]:
    """The json's categories: those the TSV was made of where noted, else the label map's."""
    with open(yaml_file, encoding="utf-8") as file:
        noted = yaml.safe_load(file).get("categories")
    if noted is None:
        numbers = records.label_numbers.tolist()
        return [{"id": k, "name": name} for k, name in zip(numbers, records.class_names)]
    with open(yaml_file.parent / noted, encoding="utf-8") as file:
        categories = json.load(file)
    if [category["name"] for category in categories] != records.class_names:
        raise ValueError(f"{noted} of {yaml_file} and its label map name different classes.")
    return categories


def _numbers(values: Iterable[Decimal]) -> str:
    return ", ".join(map(str, values))


def _in_threads(function: Callable[[Any], T], items: Sequence[Any], workers: int) -> Iterator[T]:
    """The results in order, at most a window of them ahead of what was taken."""
    with ThreadPoolExecutor(workers) as executor:
        for start in range(0, len(items), WINDOW):
            yield from executor.map(function, items[start : start + WINDOW])


def _bar(items: Sequence[T], what: str) -> Iterable[T]:
    return tqdm(items, what, disable=None)


def _is_file(record: Record) -> bool:
    return os.path.isfile(record["file_name"])


def _write_json(path: str, content: Any) -> None:
    _write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _write_text(path: str, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


if __name__ == "__main__":
    sys.exit(main())
