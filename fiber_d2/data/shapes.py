"""The generated "shapes" data set, written in the formats of the real ones.

Below the root: ``images/{train,val}/``; in ``annotations/``: ``instances_{split}.json`` (COCO),
``final_flickr_separateGT_{split}.json`` (captions with phrases), ``finetune_shapes_{split}.json``
(referring expressions), ``lvis_{split}.json``; in ``flickr30k_entities/``: ``{split}.txt``,
``Annotations/*.xml``, ``Sentences/*.txt``; and ``shapes.json``, which is written last and holds
the parameters and the counts.

    python -m fiber_d2.data.shapes --root datasets/shapes --seed 0 --num-train 2000 --num-val 400
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iopath.common.file_io import file_lock
from tqdm import tqdm

from .shapes_params import FORMAT_VERSION, SPLITS, ShapesParams
from .shapes_write import SplitWriter

MARKER = "shapes.json"

logger = logging.getLogger(__name__)


def generate_shapes(root: str | os.PathLike[str], **params: Any) -> dict[str, dict[str, int]]:
    """Writes the data set into a folder, whatever is in it already.

    Args:
        root: the folder; made where missing.
        params: see ``ShapesParams``.

    Returns:
        per split, the number of images, objects, sentences, phrases and expressions.

    Raises:
        ValueError: a parameter that is unknown or cannot be used.
    """
    return _generate(Path(root), ShapesParams.from_mapping(params))


def _generate(root: Path, params: ShapesParams) -> dict[str, dict[str, int]]:
    statistics, train = {}, None
    for split in SPLITS:
        writer = SplitWriter(root, params, split)
        count = params.num_images(split)
        # Where nobody watches, one line per split in the log is progress enough.
        for index in tqdm(
            range(count), desc=f"shapes {split}", unit="image", disable=not sys.stderr.isatty()
        ):
            writer.add(index)
        statistics[split] = writer.finish(train)
        logger.info("shapes %s: %s", split, statistics[split])
        if split == "train" and count:
            train = writer
    marker = _marker(params) | {"statistics": statistics}
    (root / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return statistics


def prepare_shapes(root: str | os.PathLike[str], **params: Any) -> str:
    """Makes sure that the data set of these parameters is in a folder.

    A finished set of the same parameters is left alone; one of others is replaced. The files are
    written beside the folder and moved there when complete, under a lock, so that a killed run
    leaves nothing half done and several processes may call this at once.

    Args:
        root: the folder of the data set.
        params: see ``ShapesParams``.

    Returns:
        ``root``, as a string.

    Raises:
        ValueError: a parameter that is unknown or cannot be used, or a folder that holds something
            other than a generated data set.
    """
    wanted = ShapesParams.from_mapping(params)
    place = Path(os.path.realpath(root))
    if is_prepared(place, wanted):
        return str(root)
    place.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(place.with_name(f".{place.name}"))):
        # Another process may have finished while this one waited for the lock.
        if not is_prepared(place, wanted):
            _replace(place, wanted)
    return str(root)


def _replace(place: Path, wanted: ShapesParams) -> None:
    if place.exists() and any(place.iterdir()) and not (place / MARKER).is_file():
        raise ValueError(
            f"{place} is not empty and holds no {MARKER}, so it is not a generated data set. "
            "Choose another root, or remove the folder."
        )
    partial = place.with_name(f".{place.name}.partial")
    old = place.with_name(f".{place.name}.old")
    for leftover in (partial, old):  # of a run that was killed
        if leftover.exists():
            shutil.rmtree(leftover)
    logger.info("Generating %d + %d shapes images in %s", wanted.num_train, wanted.num_val, place)
    _generate(partial, wanted)
    if place.exists():
        place.rename(old)
    partial.rename(place)
    if old.exists():
        shutil.rmtree(old)


def is_prepared(root: str | os.PathLike[str], params: ShapesParams) -> bool:
    """Whether a finished data set of these parameters, in the format of today, is in a folder."""
    try:
        marker = json.loads((Path(root) / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except json.JSONDecodeError as error:
        raise ValueError(f"{Path(root) / MARKER} is damaged ({error}); remove it.") from error
    expected = _marker(params)
    return {key: marker.get(key) for key in expected} == expected


def _marker(params: ShapesParams) -> dict[str, Any]:
    plain = json.loads(json.dumps(dataclasses.asdict(params)))  # tuples become lists
    return {"format_version": FORMAT_VERSION, "parameters": plain}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Generate the shapes data set.")
    parser.add_argument("--root", required=True, help="folder to write, e.g. datasets/shapes")
    for parameter in dataclasses.fields(ShapesParams):
        default = parameter.default
        options: dict[str, Any] = {"type": float if default is None else type(default)}
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            words = isinstance(default[0], str)
            options = {"type": type(default[0]), "nargs": "+" if words else len(default)}
        flag = "--" + parameter.name.replace("_", "-")
        parser.add_argument(flag, default=default, help=f"default: {default}", **options)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        root = prepare_shapes(values.pop("root"), **values)
    except ValueError as error:
        parser.error(str(error))
    marker = json.loads((Path(root) / MARKER).read_text(encoding="utf-8"))
    for split, counts in marker["statistics"].items():
        print(f"{split}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
