"""Predictions of an evaluation that is under way, on disk: an interrupted one can go on.

One file of JSON lines per process: what the evaluation is, then one line per batch with the model's
inputs (without pixels) and outputs. Arrays are stored to the last bit, so that an evaluator that
is given them again counts what it would have counted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from fiber_d2.structures import Prompt
from fiber_d2.text.prompts import shorten

logger = logging.getLogger(__name__)

_FORMAT = "fiber_d2 predictions of an unfinished evaluation, version 1"
_NAME = re.compile(r"partial_rank\d+\.jsonl")
_PROMPT_TENSORS = ("input_ids", "attention_mask", "positive_map", "target_ids")
_TAG = "__type__"


class SavedPredictions:
    """The predictions that processes of an evaluation have saved, and where to add to them.

    Images go by their positions in the data set, so that another number of processes may go on.
    A line is written as a whole: what kills a process costs the batch at work, no more.

    Args:
        folder: of the files ``partial_rank<r>.jsonl``.
        fingerprint: what the predictions depend on: JSON values. All processes must agree on it.
        resume: use what the folder holds; otherwise it is deleted.

    Raises:
        ValueError: the saved predictions belong to another evaluation, or a file is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: Mapping[str, Any],
        *,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._places: dict[int, tuple[Path, int, int]] = {}
        self._prompts: dict[str, Prompt] = {}
        self._line: tuple[tuple[Path, int], list[Any]] | None = None
        self._file: IO[bytes] | None = None
        self._written_prompts: set[str] = set()
        self._usable = True
        path = self.folder / f"partial_rank{comm.get_rank()}.jsonl"
        end = 0
        if resume:
            for found in self._paths():
                length = self._index(found)
                end = length if found == path else end
        # Nobody may write before everybody has read.
        comm.synchronize()
        if comm.is_main_process() and not resume:
            self.discard(warn=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        comm.synchronize()
        self._open(path, end)

    def __len__(self) -> int:
        """Images whose predictions are saved."""
        return len(self._places)

    def has(self, positions: Sequence[int]) -> bool:
        """Whether all these images are saved."""
        return all(position in self._places for position in positions)

    def add(
        self,
        positions: Sequence[int],
        inputs: Sequence[Mapping[str, Any]],
        outputs: Sequence[Mapping[str, Any]],
    ) -> None:
        """Save a batch; pixels are left out."""
        if not self._usable or self._file is None:
            return
        lines: list[dict[str, Any]] = []
        try:
            items = [
                [self._encode({k: v for k, v in item.items() if k != "image"}, lines), encoded]
                for item, encoded in zip(inputs, (self._encode(o, lines) for o in outputs))
            ]
        except TypeError as error:
            logger.warning(
                "Predictions are not saved while this evaluation runs (%s): it cannot be resumed.",
                error,
            )
            self._usable = False
            return
        lines.append({"positions": list(positions), "items": items})
        self._write(lines)

    def load(self, positions: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Inputs (without ``image``) and outputs of saved images, on the CPU."""
        pairs = []
        for position in positions:
            path, offset, place = self._places[position]
            if self._line is None or self._line[0] != (path, offset):
                with open(path, "rb") as file:
                    file.seek(offset)
                    self._line = ((path, offset), json.loads(file.readline())["items"])
            pairs.append([self._decode(part) for part in self._line[1][place]])
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def close(self) -> None:
        """Close the file of this process; its predictions stay."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self, *, warn: bool = False) -> None:
        """Delete the files of all processes. For one process, while no other writes."""
        paths = self._paths()
        if paths and warn:
            logger.warning(
                "Deleting the saved predictions of an interrupted evaluation in %s; --resume-eval "
                "would have gone on from them.",
                self.folder,
            )
        for path in paths:
            path.unlink()

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if _NAME.fullmatch(p.name))

    def _open(self, path: Path, end: int) -> None:
        # Unbuffered: a batch is with the operating system when `add` returns.
        self._file = open(path, "ab", buffering=0)
        self._file.truncate(end)
        if end == 0:
            self._write([{"format": _FORMAT, "fingerprint": self.fingerprint}])

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        data = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        while data:
            data = data[self._file.write(data) :]

    def _index(self, path: Path) -> int:
        """Note what a file holds; the length of it that is whole."""
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    # The process was killed while it wrote.
                    break
                try:
                    self._index_line(path, offset, json.loads(line), first=number == 0)
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"Line {number + 1} of {path} is damaged ({error!r}): delete the file, its "
                        "images are then evaluated again."
                    ) from error
                offset += len(line)
        return offset

    def _index_line(self, path: Path, offset: int, line: Any, *, first: bool) -> None:
        if first:
            if line.get("format") != _FORMAT:
                raise ValueError(f"{path} is no file of saved predictions: move it away.")
            check_fingerprint(line["fingerprint"], self.fingerprint, self.folder)
        elif "prompt" in line:
            self._prompts[line["prompt"]] = Prompt(
                text=line["text"], **{name: _array_of(line[name]) for name in _PROMPT_TENSORS}
            )
        else:
            for place, position in enumerate(line["positions"]):
                self._places.setdefault(position, (path, offset, place))

    def _encode(self, value: Any, lines: list[dict[str, Any]]) -> Any:
        """JSON for a value; prompts, which images share, become lines of their own."""
        if value is None or isinstance(value, (bool, int, float, str)):
            # Enumerations of numbers are stored as numbers.
            return value
        if isinstance(value, torch.Tensor):
            return _json_of(value)
        if isinstance(value, Boxes):
            return {_TAG: "boxes", "tensor": _json_of(value.tensor)}
        if isinstance(value, Instances):
            fields = {k: self._encode(v, lines) for k, v in value.get_fields().items()}
            return {_TAG: "instances", "size": list(value.image_size), "fields": fields}
        if isinstance(value, Prompt):
            return {_TAG: "prompt", "digest": self._digest(value, lines)}
        if isinstance(value, (list, tuple)):
            items = [self._encode(item, lines) for item in value]
            return items if isinstance(value, list) else {_TAG: "tuple", "items": items}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: self._encode(item, lines) for key, item in value.items()}
        raise TypeError(f"a {type(value).__name__} among inputs or outputs cannot be stored")

    def _digest(self, prompt: Prompt, lines: list[dict[str, Any]]) -> str:
        tensors = {name: _json_of(getattr(prompt, name)) for name in _PROMPT_TENSORS}
        content = {"text": prompt.text, **tensors}
        digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
        if digest not in self._written_prompts:
            self._written_prompts.add(digest)
            lines.append({"prompt": digest, **content})
        return digest

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind = value.get(_TAG)
        if kind is None:
            return {key: self._decode(item) for key, item in value.items()}
        if kind == "tensor":
            return _array_of(value)
        if kind == "boxes":
            return Boxes(_array_of(value["tensor"]))
        if kind == "instances":
            return Instances(
                tuple(value["size"]), **{k: self._decode(v) for k, v in value["fields"].items()}
            )
        if kind == "prompt":
            return self._prompts[value["digest"]]
        return tuple(self._decode(item) for item in value["items"])


def check_fingerprint(saved: Any, present: Any, folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        ValueError: the two differ; names where, and what to do.
    """
    differences = list(_differences(saved, present, ""))
    if differences:
        raise ValueError(
            f"The predictions saved in {folder} belong to another evaluation: "
            f"{'; '.join(differences[:3])}. Evaluate without --resume-eval to start over, or give "
            "this evaluation another output folder."
        )


def _differences(saved: Any, present: Any, name: str) -> Any:
    if isinstance(saved, dict) and isinstance(present, dict):
        for key in dict.fromkeys([*saved, *present]):
            inner = f"{name}.{key}" if name else key
            yield from _differences(saved.get(key), present.get(key), inner)
    elif saved != present:
        was, present = (shorten(repr(value), 80) for value in (saved, present))
        yield f"{name} was {was} and is {present}"


def _json_of(tensor: torch.Tensor) -> dict[str, Any]:
    tensor = tensor.detach().cpu()
    # numpy knows no bfloat16; every one is a float32.
    array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return {
        _TAG: "tensor",
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "data": base64.b64encode(array.tobytes()).decode(),
    }


def _array_of(value: Mapping[str, Any]) -> torch.Tensor:
    array = np.frombuffer(base64.b64decode(value["data"]), dtype=np.dtype(value["dtype"]))
    # torch wants the byte order of the machine and memory of its own.
    array = array.astype(array.dtype.newbyteorder("="), copy=True)
    return torch.from_numpy(array.reshape(value["shape"]))
