"""Reading the original's yaml files as the original does: merged, over its defaults."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .fields import DEFAULTS


class Original(Mapping[str, Any]):
    """Merged files of the original, by dotted names; its default where no file has a field.

    Args:
        given: what the files and the command line say.

    Attributes:
        given: the same.
        read: names that somebody has asked for.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self.given[key] if key in self.given else DEFAULTS[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**DEFAULTS, **self.given})

    def __len__(self) -> int:
        return len({**DEFAULTS, **self.given})


def read_files(paths: Sequence[str], pairs: Sequence[str] = ()) -> Original:
    """Merge yaml files and ``KEY VALUE`` pairs, later ones winning.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not yaml, no configuration of FIBER, or a key without a value.
    """
    given: dict[str, Any] = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist.")
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not plain yaml: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no configuration: it holds no sections such as MODEL.")
        given.update(_flatten(content))
    if len(pairs) % 2:
        raise ValueError(f"{pairs[-1]} has no value: overrides are pairs of KEY VALUE.")
    given.update({key: literal(value) for key, value in zip(pairs[::2], pairs[1::2])})
    _check_model(given, paths)
    return Original(given)


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = literal(value)
    return flat


def literal(value: Any) -> Any:
    """As yacs reads it: text such as ``(1, 2)`` is the Python literal."""
    if isinstance(value, str):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def _check_model(given: Mapping[str, Any], paths: Sequence[str]) -> None:
    architecture = given.get("MODEL.META_ARCHITECTURE")
    if architecture is None:
        raise ValueError(
            f"{' and '.join(paths)}: nothing is said of the model. Name the file that the "
            "original's --config-file names first, and files of tasks after it."
        )
    if architecture != "GeneralizedVLRCNN" or given.get("MODEL.SWINT.VERSION") != "fusion":
        raise ValueError(
            f"{paths[0]} describes another model than FIBER: MODEL.META_ARCHITECTURE is "
            "GeneralizedVLRCNN and MODEL.SWINT.VERSION is fusion in FIBER's files."
        )
    version = given.get("MODEL.BACKBONE.FUSION_VERSION", DEFAULTS["MODEL.BACKBONE.FUSION_VERSION"])
    if version not in ("v2", "v3"):
        raise ValueError(
            f"{paths[0]}: MODEL.BACKBONE.FUSION_VERSION is {version}, but only v2 and v3 were "
            "published, and only these are here."
        )
