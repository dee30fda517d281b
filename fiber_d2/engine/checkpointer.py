"""Checkpoints that are complete or absent, and that say what is wrong with them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys

MAX_NAMES = 5
# What torch.load raises for damaged or foreign files, depending on where they break.
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError)


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Let ``write`` fill a file beside ``path`` and put it in place when it is safely on disk.

    Whoever reads ``path`` meanwhile, or after a crash, finds the old file or the new one, whole.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    # A fixed name: what a killed process left is overwritten by the next attempt.
    temporary = path + ".tmp"
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):
        # The renaming itself must survive a power cut, too.
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class FiberCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes, safe loading and strict names.

    Files hold tensors and plain values only, and are loaded as such: a checkpoint cannot run code.
    A checkpoint that does not fit the model is an error, never a partly random model.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and make it the one to resume from.

        Args:
            kwargs: more to store; tensors and plain values.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load the model and the checkpointables that the file holds; return the rest.

        Args:
            path: a ``.pth`` file or a URL; empty loads nothing.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that cannot be read, or that belongs to another model.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(
                f"The checkpoint {path} does not exist: check the path of the checkpoint to start "
                f"from{self._hint_at_others(path)}."
            )
        return super().load(path, *args, **kwargs)

    def _hint_at_others(self, path: str) -> str:
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            return ""
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pth"))
        return f" (in {folder} there are {', '.join(names[-MAX_NAMES:])})" if names else ""

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            loaded = torch.load(filename, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"The checkpoint {filename} cannot be read: it is damaged, or no PyTorch file of "
                f"tensors and plain values ({reason[0] if reason else type(error).__name__})."
            ) from error
        weights = loaded.get("model", loaded) if isinstance(loaded, dict) else None
        if not isinstance(weights, dict) or not weights:
            raise ValueError(f"The checkpoint {filename} holds no model weights.")
        if not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise ValueError(
                f"The checkpoint {filename} is no state dict of a model: beside tensors it holds "
                f"{_shorten([k for k, v in weights.items() if not isinstance(v, torch.Tensor)])}."
            )
        self._loading = filename
        return loaded if "model" in loaded else {"model": loaded}

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        result = super()._load_model(checkpoint)
        wrong_shape = [
            f"{name} {tuple(found)} instead of {tuple(needed)}"
            for name, found, needed in result.incorrect_shapes
        ]
        misfits = {name for name, *_ in result.incorrect_shapes}
        missing = [name for name in result.missing_keys if name not in misfits]
        problems = [
            f"{len(names)} {what}: {_shorten(names)}"
            for what, names in (
                ("missing", missing),
                ("unexpected", list(result.unexpected_keys)),
                ("of another shape", wrong_shape),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"The checkpoint {self._loading} belongs to another model. Parameters "
                f"{'; '.join(problems)}. Use the configuration it was trained with."
            )
        return result

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continue from the last checkpoint of ``save_dir``, else take the weights of ``path``.

        Raises:
            FileNotFoundError, ValueError: as of :meth:`load`.
        """
        if resume and not self.has_checkpoint():
            self.logger.warning("No checkpoint to resume from in %s: a new start.", self.save_dir)
        return super().resume_or_load(path, resume=resume)


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES])
    rest = len(names) - MAX_NAMES
    return f"{shown} and {rest} more" if rest > 0 else shown
