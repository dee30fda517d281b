"""Checkpoints that are complete or absent, and that say what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _IncompatibleKeys

from fiber_d2.checkpoint import convert_fiber_state_dict, is_fiber_state_dict
from fiber_d2.checkpoint.convert import check_variant
from fiber_d2.checkpoint.files import (
    LAST_CHECKPOINT,
    list_problems,
    read_file,
    resolve_checkpoint_path,
    state_dict_of,
)


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
            path: a ``.pth`` file, ours or the original FIBER's, a ``last_checkpoint`` file that
                names one, or a URL; empty loads nothing.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that cannot be read, or that belongs to another model.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(
                f"The checkpoint {path} does not exist: check the path of the checkpoint to start "
                f"from{self._hint_at_others(path)}."
            )
        if os.path.basename(path) == LAST_CHECKPOINT and "://" not in path:
            path = resolve_checkpoint_path(path)
        return super().load(path, *args, **kwargs)

    def _hint_at_others(self, path: str) -> str:
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            return ""
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pth"))
        return f" (in {folder} there are {', '.join(names[-5:])})" if names else ""

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = read_file(filename)
        weights = state_dict_of(loaded, filename, keys=("model",))
        self._loading = filename
        if is_fiber_state_dict(weights):
            # One of the original's files: its optimiser and iteration mean nothing here.
            self.logger.info("%s has the original FIBER's names: converting", filename)
            converted = convert_fiber_state_dict(weights)
            check_variant(converted, self.model.state_dict())
            return {"model": converted}
        return loaded if "model" in loaded else {"model": loaded}

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        result = super()._load_model(checkpoint)
        wrong_shape = [
            f"{name} {tuple(found)} instead of {tuple(needed)}"
            for name, found, needed in result.incorrect_shapes
        ]
        misfits = {name for name, *_ in result.incorrect_shapes}
        missing = [name for name in result.missing_keys if name not in misfits]
        problems = list_problems(
            {
                "missing": missing,
                "unexpected": list(result.unexpected_keys),
                "of another shape": wrong_shape,
            }
        )
        if problems:
            raise ValueError(
                f"The checkpoint {self._loading} belongs to another model. Parameters "
                f"{problems}. Use the configuration it was trained with."
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
