"""What the model is shown: captions of training images, and its answers drawn beside the truth."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from transformers import PreTrainedTokenizerFast

from fiber_d2.drawing import contact_sheet, save_png
from fiber_d2.structures import Prompt
from fiber_d2.text import load_tokenizer
from fiber_d2.visualization import GroundTruth, draw_predictions, prompt_words

from .randomness import preserved_random_state
from .writers import TextLog

PROMPTS_FILE = "prompts.txt"
# Images of a batch that are drawn, and whose captions are written.
NUM_PICTURES = 4
NUM_PROMPTS = 8


class TrainingPictures(HookBase):
    """Draws images of the present batch, and writes their captions, in the main process.

    Captions go to ``<output_dir>/prompts.txt`` and TensorBoard, at the first iteration and every
    ``period`` iterations; pictures to ``<output_dir>/pictures/training`` and TensorBoard, every
    ``period`` iterations. The training is the same with and without it: random numbers and modes
    of modules are put back.

    Args:
        step: a :class:`~fiber_d2.engine.step.StepTrainer`.
        model: bare, not wrapped for distributed training.
        tokenizer: name of the one that the prompts are made with.
        output_dir: of the training.
        period: iterations between two batches that are drawn; 0 draws none.
        texts: takes captions to TensorBoard.
    """

    def __init__(
        self,
        step: Any,
        model: nn.Module,
        tokenizer: str,
        *,
        output_dir: str,
        period: int,
        texts: TextLog,
    ) -> None:
        self._step = step
        self._model = model
        self._tokenizer_name = tokenizer
        self._output_dir = output_dir
        self._period = period
        self._texts = texts

    def before_train(self) -> None:
        if comm.is_main_process():
            self._tokenizer = load_tokenizer(self._tokenizer_name)

    def after_step(self) -> None:
        iteration = self.trainer.iter
        due = self._period > 0 and (iteration + 1) % self._period == 0
        if not comm.is_main_process() or not (due or iteration == self.trainer.start_iter):
            return
        batch = [item for item in self._step.last_batch if isinstance(item.get("prompt"), Prompt)]
        self._write_prompts(batch[:NUM_PROMPTS], iteration)
        if due and batch:
            self._draw(batch[:NUM_PICTURES], iteration)

    def _write_prompts(self, batch: Sequence[Mapping[str, Any]], iteration: int) -> None:
        texts = [describe_item(item, self._tokenizer) for item in batch]
        with open(os.path.join(self._output_dir, PROMPTS_FILE), "a", encoding="utf-8") as file:
            file.write(f"Iteration {iteration}\n\n" + "".join(f"{text}\n\n" for text in texts))
        # Four spaces make Markdown keep lines, and characters that mean something to it.
        shown = "\n\n".join("    " + text.replace("\n", "\n    ") for text in texts)
        self._texts.put("train/prompts", shown, iteration)

    def _draw(self, batch: Sequence[Mapping[str, Any]], iteration: int) -> None:
        with preserved_random_state(), evaluation_mode(self._model), torch.no_grad():
            pictures = draw_batch(self._model, batch, self._tokenizer)
        sheet = contact_sheet(pictures, columns=2)
        folder = Path(self._output_dir, "pictures", "training")
        save_png(folder / f"iteration_{iteration:07d}.png", sheet)
        channels_first = np.ascontiguousarray(sheet.transpose(2, 0, 1))
        self.trainer.storage.put_image("train/pictures", channels_first)


def draw_batch(
    model: nn.Module, batch: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> list[np.ndarray]:
    """Pictures of training inputs with what the model, in evaluation mode, finds in them.

    Args:
        batch: training inputs, see :class:`~fiber_d2.data.mapper.FiberDatasetMapper`.
    """
    # Pixels of the augmented image instead of the file's: so the truth is given.
    own_size = [
        {**item, "height": item["image"].shape[-2], "width": item["image"].shape[-1]}
        for item in batch
    ]
    truth = [_truth(item, tokenizer) for item in batch]
    return draw_predictions(own_size, model(own_size), truth, tokenizer=tokenizer)


def describe_item(item: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    """A training input in words: its file, its caption, and the words its boxes are tied to."""
    _, words = _truth(item, tokenizer)
    counts = Counter(words)
    boxes = ", ".join(f"{word or '(no word)'} x{count}" for word, count in counts.items())
    return (
        f"image {item.get('image_id')} ({item.get('file_name', 'no file')})\n"
        f"  caption ({item['prompt'].num_tokens} tokens): {item['prompt'].text}\n"
        f"  boxes ({len(words)}): {boxes or 'none'}"
    )


def _truth(item: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> GroundTruth:
    """Boxes in pixels of ``image``, and the words that their tokens read."""
    instances = item["instances"]
    marked = instances.gt_positive_map.float()
    per_box = replace(item["prompt"], positive_map=marked, target_ids=torch.arange(len(marked)))
    return instances.gt_boxes.tensor.numpy(), prompt_words(per_box, tokenizer)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
