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
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode as FvcoreCfgNode
from yacs.config import CfgNode

# What torch.load raises for damaged or foreign files, depending on where they break.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError)

LAST_CHECKPOINT = "last_checkpoint"


def _allow_list() -> list[Any]:
    """What files of the original and of similar code hold beside tensors.

    All of these are containers of data: creating one calls nothing that a file could choose.
    Beside them torch itself allows tensors, storages, OrderedDict, Counter and plain values.
    """
    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray
    named: list[Any] = []
    for function in ("scalar", "_reconstruct"):
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            named.append((getattr(multiarray, function), f"{module}.{function}"))
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdSUO"}
    plain: list[Any] = [
        argparse.Namespace,
        CfgNode,
        FvcoreCfgNode,
        np.ndarray,
        np.dtype,
        *sorted(dtypes, key=lambda kind: kind.__name__),
        collections.defaultdict,
        collections.deque,
        pathlib.PosixPath,
        pathlib.PurePosixPath,
        codecs.encode,  # how bytes are written
        # The values that defaultdict may start from.
        *(list, dict, set, frozenset, tuple, int, float, str, bool),
    ]
    with contextlib.suppress(ImportError):
        from detectron2.config import CfgNode as DetectronCfgNode

        plain.append(DetectronCfgNode)
    allowed = plain + named
    add = getattr(torch.serialization, "add_safe_globals", None)
    if add is not None and "tuple" not in str(inspect.signature(add)).lower():
        # Older torch takes functions without the name that a file calls them by.
        allowed = plain + [multiarray.scalar, multiarray._reconstruct]
    return allowed


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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    refused = next((line.strip() for line in lines if "Unsupported global" in line), None)
    if refused is None:
        return (
            f"The checkpoint {path} cannot be read: it is damaged, or no PyTorch file of tensors "
            f"and plain values ({lines[0]})."
        )
    return (
        f"The checkpoint {path} holds more than tensors and plain values, and reading it could run "
        f"code, so it is refused ({refused.split('. ')[0]}). If you trust its source, load it in a "
        "Python of your own and save only its weights: "
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


def shorten(names: list[str], limit: int = 5) -> str:
    """The first names and how many more there are."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
