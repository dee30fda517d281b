"""Checkpoints that are complete or absent, and that say what is wrong with them."""

from __future__ import annotations

import os
import re
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import _IncompatibleKeys
from torch import nn

from fiber_d2.checkpoint import convert_fiber_state_dict, is_fiber_state_dict
from fiber_d2.checkpoint.convert import check_variant
from fiber_d2.checkpoint.files import (
    LAST_CHECKPOINT,
    averaged_weights,
    list_problems,
    read_file,
    resolve_checkpoint_path,
    state_dict_of,
)
from fiber_d2.modeling.roberta import PROMPT

from .durable import DamagedFileError, check_checkpoint, save_verified, write_atomically
from .ema import EMA_KEY, check_weights

_NUMBERED = re.compile(r"\w+_\d{7}\.pth")


class FiberCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with verified atomic writes, safe loading and strict names.

    A file takes its place, and becomes the one to resume from, after it has been read back from
    the disk and compared with what was in memory. Only then may older ones be deleted.

    Files hold tensors and plain values only, and are loaded as such: a checkpoint cannot run code.
    A checkpoint that does not fit the model is an error, never a partly random model.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        weights: str = "model",
        **checkpointables: Any,
    ) -> None:
        """As Detectron2's, and ``weights``: which of a file's the model gets.

        Args:
            weights: "model", or "ema" for the averages of a training that has made them.

        Raises:
            ValueError: other ``weights``.
        """
        check_weights(weights)
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.weights = weights

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and make it the one to resume from.

        Args:
            kwargs: more to store; tensors and plain values.

        Raises:
            PlainRunError: the disk is full or failing. The last checkpoint still is the last one.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        save_verified(data, path)
        self.tag_last_checkpoint(os.path.basename(path))

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` with the model alone, which nothing resumes from.

        Averaged weights are weights of the model, too, where there are any.

        Args:
            kwargs: more to store; tensors and plain values.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving weights to %s", path)
        data = {"model": self.model.state_dict(), **kwargs}
        if EMA_KEY in self.checkpointables:
            data[EMA_KEY] = self.checkpointables[EMA_KEY].state_dict()
        save_verified(data, path)

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
        if self.weights == EMA_KEY:
            self.logger.info("Taking the averaged weights of %s", filename)
            loaded = {**loaded, "model": averaged_weights(loaded, filename)}
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
        # What prompt tuning adds is absent in what it starts from, and starts at zero.
        missing = [
            name
            for name in result.missing_keys
            if name not in misfits and not name.endswith(PROMPT)
        ]
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

        All processes have to call it.

        Raises:
            FileNotFoundError, ValueError: as of :meth:`load` and :meth:`find_last_sound`.
        """
        if resume and self.can_resume():
            return self.load(self.find_last_sound())
        if resume:
            self.logger.warning("No checkpoint to resume from in %s: a new start.", self.save_dir)
        return self.load(path, checkpointables=[])

    def can_resume(self) -> bool:
        """Whether the main process's folder has a checkpoint; all processes have to call it.

        Others may not see it yet.
        """
        return comm.all_gather(self.has_checkpoint())[0]

    def checkpoint_to_evaluate(self, path: str, *, resume: bool) -> str:
        """With ``resume`` the last sound checkpoint, where there is one, else ``path``."""
        return self.find_last_sound() if resume and self.can_resume() else path

    def find_last_sound(self) -> str:
        """The last checkpoint of ``save_dir``, or where that is damaged the one before it, etc.

        The main process looks, the others get to know; all have to call it.

        Raises:
            FileNotFoundError: other machines do not see the file.
            ValueError: none of the checkpoints is sound.
        """
        name, problem = None, None
        if comm.is_main_process():
            try:
                name = self._look_for_sound()
            except ValueError as error:
                problem = str(error)
        name, problem = comm.all_gather((name, problem))[0]
        if problem is not None:
            raise ValueError(problem)
        path = os.path.join(self.save_dir, name)
        without = [r for r, here in enumerate(comm.all_gather(os.path.isfile(path))) if not here]
        if without:
            raise FileNotFoundError(
                f"The checkpoint {path} of process 0 does not exist for {len(without)} of the "
                f"other processes, the first one {without[0]}: let output_dir be on storage that "
                "all machines share, or copy the file there."
            )
        return path

    def _look_for_sound(self) -> str:
        last = os.path.basename(self.get_checkpoint_file())
        # Files of an older, longer run may lie there: what comes after the last one is not meant.
        earlier = sorted(
            (
                name
                for name in os.listdir(self.save_dir)
                if _NUMBERED.fullmatch(name) and (name < last or not _NUMBERED.fullmatch(last))
            ),
            reverse=True,
        )
        problems = []
        for name in [last, *earlier]:
            path = os.path.join(self.save_dir, name)
            try:
                if not os.path.isfile(path):
                    raise DamagedFileError(f"{name} does not exist")
                check_checkpoint(path)
            except DamagedFileError as error:
                problems.append(str(error))
                continue
            if problems:
                self.logger.warning(
                    "The last checkpoint cannot be used (%s): going on from the one before, %s. "
                    "The iterations since then are done again.",
                    "; ".join(problems),
                    name,
                )
            return name
        raise ValueError(
            f"No checkpoint in {self.save_dir} can be used: {'; '.join(problems)}. Start from "
            "other weights, without --resume."
        )
