"""Reading checkpoint files: tensors and plain values only, never code."""

from __future__ import annotations

import argparse
import codecs
import collections
import contextlib
import inspect
import os
import pathlib
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

# What torch.load raises for damaged or foreign files, depending on where they break.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError)

LAST_CHECKPOINT = "last_checkpoint"

# In torch's long message, the words about an object that it would not make.
_REFUSAL = re.compile(r"unsupported (global:?|class) .*?(?= was not| whose|\. |\n|$)", re.I)


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _list_of(values: Iterable[Any] = (), *_: Any) -> list[Any]:
    return list(values)


# Classes that torch.load makes but does not fill, and what stands in for them. The classes
# themselves need not be installed.
_STAND_INS = (
    *(
        (collections.OrderedDict, f"{module}.CfgNode")
        for module in ("yacs.config", "fvcore.common.config", "detectron2.config.config")
    ),
    (_empty_dict, "collections.defaultdict"),
    (_list_of, "collections.deque"),
)


def _allow_list() -> list[Any]:
    """What files of the original and of similar code hold beside tensors.

    All of these are containers of data: creating one calls nothing that a file could choose.
    Beside them torch itself allows tensors, storages, OrderedDict, Counter and plain values.
    """
    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray
    numpy_builders = (multiarray.scalar, multiarray._reconstruct)
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdSUO"}
    plain: list[Any] = [
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        *sorted(dtypes, key=lambda kind: kind.__name__),
        pathlib.PosixPath,
        pathlib.PurePosixPath,
        codecs.encode,  # how bytes are written
        *(bytes, bytearray, list, dict, set, frozenset, tuple, int, float, complex, str, bool),
    ]
    add = getattr(torch.serialization, "add_safe_globals", None)
    if add is not None and "tuple" not in str(inspect.signature(add)).lower():
        # Older torch takes no name beside the object, so stand-ins are impossible.
        return [*plain, *numpy_builders]
    # numpy 1 and numpy 2 call them by different names.
    named = [
        (builder, f"{module}.{builder.__name__}")
        for builder in numpy_builders
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    ]
    return [*plain, *named, *_STAND_INS]


def _allowing() -> contextlib.AbstractContextManager[None]:
    """The allow-list, in force inside; where torch is too old for it, torch's own list alone."""
    context = getattr(torch.serialization, "safe_globals", None)
    return contextlib.nullcontext() if context is None else context(_allow_list())


def resolve_checkpoint_path(path: str | os.PathLike[str]) -> str:
    """The file behind ``path``: itself, or what a ``last_checkpoint`` names.

    A relative name is looked for next to ``last_checkpoint``; a path of the machine that wrote it
    also by its last part.

    Raises:
        FileNotFoundError: no such file.
    """
    path = os.fspath(path)
    if os.path.isdir(path) and os.path.isfile(os.path.join(path, LAST_CHECKPOINT)):
        path = os.path.join(path, LAST_CHECKPOINT)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The checkpoint {path} does not exist: check its path.")
    if os.path.basename(path) != LAST_CHECKPOINT:
        return path
    with open(path, "rb") as file:
        named = file.read(4096).decode("utf-8", errors="replace").strip()
    folder = os.path.dirname(path)
    for candidate in (os.path.join(folder, named), os.path.join(folder, os.path.basename(named))):
        if named and os.path.isfile(candidate):
            return candidate
    raise FileNotFoundError(
        f"{path} names the checkpoint {named!r}, which is not next to it: give the path of the "
        "checkpoint itself."
    )


def read_file(path: str | os.PathLike[str]) -> Any:
    """The content of a PyTorch (or ``.safetensors``) file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one that would have to run code to be read.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"The checkpoint {path} does not exist: check its path.")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        with _allowing():
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"Reading {path} needs the safetensors package: install it.") from error
    except UNREADABLE as error:
        raise ValueError(_explain(path, error)) from error
    except Exception as error:
        # Damaged files raise what their bytes happen to spell, e.g. SafetensorError.
        raise ValueError(_explain(path, error)) from error


def _explain(path: str, error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    refusal = _REFUSAL.search(text)
    if refusal is None:
        reason = text.splitlines()[0].split(". ")[0]
        return (
            f"The checkpoint {path} cannot be read: it is damaged, or no PyTorch file of tensors "
            f"and plain values ({reason})."
        )
    return (
        f"The checkpoint {path} cannot be read: it holds more than tensors and plain values "
        f"({refusal[0].strip()}), which is refused because it could run code. If you trust its "
        "source, load it in a Python of your own and save only its weights: "
        'torch.save({"model": checkpoint["model"]}, "weights.pth").'
    )


def state_dict_of(
    content: Any, path: str, *, keys: tuple[str, ...] = ("model", "state_dict")
) -> dict[str, torch.Tensor]:
    """The weights in a file's content: the first of ``keys`` that it has, or the content itself.

    Raises:
        ValueError: no weights, or something else among them.
    """
    weights = content
    if isinstance(content, Mapping):
        weights = next((content[key] for key in keys if key in content), content)
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"The checkpoint {path} holds no model weights.")
    others = [str(key) for key, value in weights.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"The checkpoint {path} is no state dict of a model: beside tensors it holds "
            f"{shorten(others)}."
        )
    return dict(weights)


def averaged_weights(content: Any, path: str) -> dict[str, torch.Tensor]:
    """The averaged weights in a checkpoint's content.

    They are the entry ``ema``, or ``model_ema`` in the original's files.

    Raises:
        ValueError: there are none.
    """
    content = content if isinstance(content, Mapping) else {}
    key = "ema" if "ema" in content else "model_ema"
    if key not in content:
        raise ValueError(
            f"The checkpoint {path} holds no averaged weights (ema, or model_ema as the original "
            "calls them): take those of the model."
        )
    average = content[key]
    if key == "model_ema" and isinstance(average, Mapping):
        # Some averages keep their decay and number of updates beside the weights.
        average = average.get("module", average.get("model", average))
        average = {k: v for k, v in average.items() if isinstance(v, torch.Tensor)}
    return average


def list_problems(problems: Mapping[str, list[str]], limit: int = 5) -> str:
    """What is wrong with which names, as ``2 missing: a, b; 1 unexpected: c``; empty if nothing."""
    return "; ".join(
        f"{len(names)} {what}: {shorten(names, limit)}" for what, names in problems.items() if names
    )


def shorten(names: list[str], limit: int = 5) -> str:
    """The first names and how many more there are."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
