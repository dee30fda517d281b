"""Reading the refs files of REFER, as json or as pickles that cannot run code."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from common import fields, read_json

_NUMBER = re.compile(r"[biuf][1248]")


class _NumberType:
    """Stands for numpy.dtype: remembers which number it is about, and does nothing else."""

    def __init__(self, code: str, *_: Any) -> None:
        if not _NUMBER.fullmatch(code):
            raise pickle.UnpicklingError(f"it holds numpy data of type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _number(kind: _NumberType, data: bytes | str) -> int | float | bool:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, kind.dtype, count=1)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes with {encoding!r}")
    return text.encode(encoding)


_ALLOWED = {
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, dict, list, tuple, str, int, float, bool)
    },
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
    ("numpy", "dtype"): _NumberType,
    ("_codecs", "encode"): _latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """Makes containers, texts and numbers only; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _in_utf8(value: Any) -> Any:
    """The value with every text that was UTF-8 read as Latin-1 made good."""
    if isinstance(value, str):
        try:
            return value.encode("latin1").decode("utf-8")
        except UnicodeError:
            return value
    if isinstance(value, dict):
        return {_in_utf8(key): _in_utf8(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_in_utf8, value))
    return value


def load_plain_pickle(path: Path) -> Any:
    """Contents of a pickle of containers, texts and numbers (numpy's become Python's).

    Raises:
        ValueError: it is damaged, or asks for anything else, which is never run.
    """
    with open(path, "rb") as file:
        try:
            # Python 2 wrote these files: its texts are bytes, which Latin-1 keeps one by one.
            return _in_utf8(_PlainUnpickler(file, encoding="latin1").load())
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(
                f"{path} is no pickle of plain lists, texts and numbers ({error}). It is damaged, "
                "or could run code: fetch it again from where REFER publishes it."
            ) from error


def read_refs(path: Path) -> list[dict[str, Any]]:
    """The refs of a ``refs(<author>).p`` or a json of the same contents.

    Returns:
        Per ref at least ``ref_id``, ``ann_id``, ``image_id``, ``split`` and ``sentences``.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not one of REFER's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    refs = read_json(path) if path.suffix == ".json" else load_plain_pickle(path)
    if not isinstance(refs, list) or not refs:
        raise ValueError(f"{path} is not a refs file of REFER: it holds no list of refs.")
    for place, ref in enumerate(refs):
        names = ("ref_id", "ann_id", "image_id", "split", "sentences")
        where = f"The ref at place {place} of {path}"
        if not isinstance(fields(ref, names, where)[-1], list):
            raise ValueError(f"{where} has no list of sentences.")
    return refs
