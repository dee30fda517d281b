"""Dataset record -> model input: the image, its prompt, and boxes tied to the prompt's tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any, Protocol, Union

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from transformers import PreTrainedTokenizerFast

from fiber_d2.structures import Prompt
from fiber_d2.text import build_grounding_prompt

from .images import read_image
from .transforms import count_horizontal_flips, mirror_caption

Prompts = Union[Prompt, list[Prompt]]
Augmentations = Sequence[Union[T.Augmentation, T.Transform]]


class Prompter(Protocol):
    """Words the question about an image."""

    def for_training(self, record: dict[str, Any]) -> tuple[Prompt, list[int]]:
        """The prompt, and for each annotation of the record the row of its target.

        The row is -1 where the caption does not name the target; its box is then left out.
        """

    def for_evaluation(self, record: dict[str, Any]) -> Prompts:
        """The prompt, or the list of them where one cannot hold all targets."""

    def check(self, record: dict[str, Any], *, is_train: bool) -> None:
        """Raise ValueError where the record's prompt cannot be made. Cheap and repeatable."""


class GroundingPrompter:
    """Asks for the phrases of the record's own caption.

    Args:
        tokenizer: from :func:`~fiber_d2.text.load_tokenizer`.
        max_tokens: limit of the caption's tokens, special tokens included.
        whole_caption: read an empty ``tokens_positive`` as the whole caption, which is right for
            referring expressions; otherwise such a box is tied to no word.
        on_empty: ``"error"`` where spans meet no token, or ``"keep"``.
        on_overflow: ``"error"`` where a caption is too long, or ``"truncate"``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_tokens: int = 256,
        whole_caption: bool = False,
        on_empty: str = "error",
        on_overflow: str = "error",
    ) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.whole_caption = whole_caption
        self.on_empty = on_empty
        self.on_overflow = on_overflow

    def _prompt(self, caption: str, targets: Sequence[Sequence[Sequence[int]]]) -> Prompt:
        return build_grounding_prompt(
            self.tokenizer,
            caption,
            targets,
            max_tokens=self.max_tokens,
            on_empty=self.on_empty,
            on_overflow=self.on_overflow,
        )

    def _targets(self, record: dict[str, Any]) -> list[tuple[tuple[int, int], ...]]:
        """The spans of each annotation."""
        caption = record["caption"]
        ends = (len(caption) - len(caption.lstrip()), len(caption.rstrip()))
        whole = (ends,) if self.whole_caption else ()
        given = (a.get("tokens_positive", ()) for a in record.get("annotations", ()))
        return [tuple((begin, end) for begin, end in spans) or whole for spans in given]

    def for_training(self, record: dict[str, Any]) -> tuple[Prompt, list[int]]:
        """One target for each different set of spans among the annotations."""
        per_annotation = self._targets(record)
        targets = list(dict.fromkeys(per_annotation))
        row_of = {target: row for row, target in enumerate(targets)}
        prompt = self._prompt(record["caption"], targets)
        return prompt, [row_of[target] for target in per_annotation]

    def for_evaluation(self, record: dict[str, Any]) -> Prompt:
        """Targets are the phrases of ``tokens_positive_eval``; without it, as in training.

        An expression that nothing in the image fits is asked for all the same.
        """
        if "tokens_positive_eval" in record:
            return self._prompt(record["caption"], record["tokens_positive_eval"])
        if self.whole_caption and not record.get("annotations"):
            record = {**record, "annotations": [{}]}
        return self.for_training(record)[0]

    def check(self, record: dict[str, Any], *, is_train: bool) -> None:
        if is_train:
            self.for_training(record)
        else:
            self.for_evaluation(record)


class FiberDatasetMapper:
    """Turns a dataset record into a model input.

    1. copies the record and reads its image;
    2. applies the augmentations to image and boxes;
    3. where the image was mirrored, exchanges left and right in the caption;
    4. words the prompt and, in training, ties each box to its tokens.

    Args:
        is_train: add ``instances`` (without crowds and boxes that the augmentations left empty).
        prompter: words the prompt.
        augmentations: Detectron2 augmentations.
        image_format: channel order of the image, ``"BGR"`` or ``"RGB"``.
        swap_left_right: whether step 3 is done. Class names are never changed.
        mirrored_prompt: in evaluation, add the prompt of the mirrored image as well, where left
            and right make it another one; for test-time augmentation.
    """

    def __init__(
        self,
        *,
        is_train: bool,
        prompter: Prompter,
        augmentations: Augmentations,
        image_format: str = "BGR",
        swap_left_right: bool = True,
        mirrored_prompt: bool = False,
    ) -> None:
        self.is_train = is_train
        self.prompter = prompter
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.swap_left_right = swap_left_right
        self.mirrored_prompt = mirrored_prompt

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            record: one entry of a data set; it is not changed.

        Returns:
            The record with ``image`` (uint8, (3, H, W)) and ``prompt``; ``height`` and ``width``
            stay those of the file. In training with ``instances`` of image size (H, W):
            ``gt_boxes`` (XYXY, pixels of ``image``), ``gt_classes`` int64 (N,), the ``target_ids``
            of the boxes, and ``gt_positive_map`` bool (N, T) over the prompt's tokens.

        Raises:
            FileNotFoundError: there is no image.
            ValueError: the image cannot be read or has another size than the record says, or
                the prompt cannot be made.
        """
        record = copy.deepcopy(record)
        image = read_image(record, self.image_format)
        utils.check_image_size(record, image)
        record["image"], transforms = prepare_image(image, self.augmentations)
        if self.swap_left_right and "caption" in record and count_horizontal_flips(transforms) % 2:
            mirror_caption(record)
        if self.is_train:
            self._add_targets(record, transforms, tuple(record["image"].shape[1:]))
        else:
            record["prompt"] = _named(record, self.prompter.for_evaluation)
            if self.mirrored_prompt:
                mirrored = _mirrored(record)
                if mirrored is not None:
                    record["mirrored_prompt"] = _named(mirrored, self.prompter.for_evaluation)
        record.pop("annotations", None)
        record.pop("tokens_positive_eval", None)
        return record

    def check(self, record: dict[str, Any]) -> None:
        """Make the record's prompt without reading its image, for what that raises."""
        check = partial(self.prompter.check, is_train=self.is_train)
        _named(record, check)
        if self.swap_left_right if self.is_train else self.mirrored_prompt:
            mirrored = _mirrored(record)
            if mirrored is not None:
                _named(mirrored, check)

    def _add_targets(
        self, record: dict[str, Any], transforms: T.TransformList, image_size: tuple[int, int]
    ) -> None:
        record["annotations"] = [
            a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)
        ]
        prompt, rows = _named(record, self.prompter.for_training)
        named = [row >= 0 for row in rows]
        rows = list(compress(rows, named))
        boxes = [
            utils.transform_instance_annotations(
                {"bbox": annotation["bbox"], "bbox_mode": annotation["bbox_mode"]},
                transforms,
                image_size,
            )["bbox"]
            for annotation in compress(record["annotations"], named)
        ]
        index = torch.tensor(rows, dtype=torch.int64)
        instances = Instances(image_size)
        instances.gt_boxes = Boxes(torch.tensor(np.array(boxes).reshape(-1, 4)).float())
        instances.gt_classes = prompt.target_ids[index]
        instances.gt_positive_map = prompt.positive_map[index] > 0
        record["prompt"] = prompt
        record["instances"] = instances[instances.gt_boxes.nonempty()]


def prepare_image(
    image: np.ndarray, augmentations: T.AugmentationList
) -> tuple[torch.Tensor, T.TransformList]:
    """Pixels as they are in a file to pixels as the model takes them.

    Args:
        image: ``(H, W, 3)`` uint8.

    Returns:
        uint8 ``(3, H', W')``, and what was done to the image.
    """
    augmented = T.AugInput(image)
    transforms = augmentations(augmented)
    return torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1))), transforms


def _mirrored(record: dict[str, Any]) -> dict[str, Any] | None:
    """What is said of the mirrored image; None where that is the same."""
    if "caption" not in record:
        return None
    keys = ("image_id", "caption", "annotations", "tokens_positive_eval")
    mirrored = copy.deepcopy({key: record[key] for key in keys if key in record})
    mirror_caption(mirrored)
    return mirrored if mirrored["caption"] != record["caption"] else None


def _named(record: dict[str, Any], make: Callable[[dict[str, Any]], Any]) -> Any:
    """``make(record)``, with the image named where that fails."""
    try:
        return make(record)
    except ValueError as error:
        raise ValueError(f"Image {record['image_id']!r}: {error}") from error
