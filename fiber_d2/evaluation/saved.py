"""Reading predictions that an evaluator has saved."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fiber_d2.evaluation.records import Record

_EXAMPLES = 5


def read_records(
    path: str | os.PathLike[str],
    required: Collection[str] = (),
    optional: Collection[str] = (),
) -> list[Record]:
    """The records of a file of predictions.

    Args:
        path: a JSON list of objects.
        required: keys that every one has.
        optional: keys that it may have; any other is an error, but without ``required``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of that form; names the record and its keys.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The file of predictions {path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, list):
        raise ValueError(
            f"{path} must hold a list of predictions, but holds a {type(content).__name__}."
        )
    needed, allowed = set(required), {*required, *optional}
    for place, record in enumerate(content):
        if not isinstance(record, dict):
            raise ValueError(f"Entry {place} of {path} is {record!r} instead of an object.")
        if not needed:
            continue
        keys = set(record)
        problems = [
            f"{what} {', '.join(sorted(names))}"
            for what, names in (("lacks", needed - keys), ("has the unknown", keys - allowed))
            if names
        ]
        if problems:
            raise ValueError(
                f"Entry {place} of {path} {' and '.join(problems)}; predictions of this kind of "
                f"data set have the keys {', '.join(required)}."
            )
    return content


def foreign_error(path: str | os.PathLike[str], foreign: Sequence[Any], source: Any) -> ValueError:
    """Predictions of something that the data set does not have."""
    return ValueError(
        f"{path} holds predictions of another data set: {source} does not have the image ids "
        f"{some_of(foreign)}."
    )


def some_of(values: Sequence[Any]) -> str:
    """The first few, and how many there are."""
    shown = ", ".join(str(value) for value in values[:_EXAMPLES])
    return shown if len(values) <= _EXAMPLES else f"{shown}, ... ({len(values)} in all)"
