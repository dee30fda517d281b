"""Captions that ask for the classes of a detection data set: all of them, or those of the image
and a draw of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Union

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from fiber_d2.structures import Prompt
from fiber_d2.text.prompts import (
    Templates,
    build_detection_prompts,
    clean_templates,
    detection_caption,
)

from .readers import BACKGROUND

Prompts = Union[Prompt, list[Prompt]]


class DetectionPrompter:
    """Asks for all the classes of a data set; the prompts of evaluation are made once.

    Args:
        tokenizer: from :func:`~fiber_d2.text.load_tokenizer`.
        class_names: names by contiguous id.
        separator, max_tokens, max_classes, templates, lead, on_empty: as of
            :func:`~fiber_d2.text.build_detection_prompts`. In training the names within templates
            are cleaned as well.
        shuffle: in training, draw a new order of the classes for each image (numpy's generator).

    Raises:
        ValueError: a class has no token, or exceeds ``max_tokens`` alone.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        class_names: Sequence[str],
        *,
        separator: str = ". ",
        max_tokens: int = 256,
        max_classes: int | None = None,
        templates: Templates | None = None,
        lead: str = "",
        shuffle: bool = False,
        on_empty: str = "error",
    ) -> None:
        if shuffle and templates is not None and not isinstance(templates, str):
            raise ValueError("Classes with a template each cannot be shuffled.")
        self.tokenizer = tokenizer
        self.class_names = list(class_names)
        self.max_tokens = max_tokens
        self.shuffle = shuffle
        self._options: dict[str, Any] = {
            "separator": separator,
            "max_tokens": max_tokens,
            "max_classes": max_classes,
            "lead": lead,
            "on_empty": on_empty,
        }
        self._templates = clean_templates(templates)
        self.prompts = build_detection_prompts(
            tokenizer, self.class_names, templates=templates, **self._options
        )
        self._fixed = self.prompts
        if self._templates != templates:
            self._fixed = self._training_prompts(np.arange(len(self.class_names)))

    def for_training(self, record: dict[str, Any]) -> tuple[Prompt, list[int]]:
        """One prompt with all classes; its ``target_ids`` are the contiguous ids.

        Raises:
            ValueError: one caption cannot hold all the classes, or a category id is no class.
        """
        self.check(record, is_train=True)
        order = np.arange(len(self.class_names))
        prompts = self._fixed
        if self.shuffle:
            order = np.random.permutation(len(order))
            prompts = self._training_prompts(order)
            # An order can need a token more than another: the first name has no space before it.
            self._check_one_prompt(len(prompts))
        return _with_rows(prompts[0], order, len(order), record)

    def for_evaluation(self, record: dict[str, Any]) -> Prompts:
        """The prompt, or the list of them where one caption cannot hold all the classes."""
        return self.prompts[0] if len(self.prompts) == 1 else self.prompts

    def check(self, record: dict[str, Any], *, is_train: bool) -> None:
        """Raise ValueError where the prompt cannot be made; draws no random number."""
        if is_train:
            self._check_one_prompt(len(self._fixed))
            self._check_ids(record)

    def spelled_out(self) -> list[tuple[Prompt, list[str]]]:
        """Prompts in the words of training that ask for all the classes, as many as that takes.

        Returns:
            Each with the text of its targets, as it stands in the caption.
        """
        found = []
        for prompt in self._fixed:
            names, templates = self._select(prompt.target_ids.numpy())
            text, spans = detection_caption(names, templates=templates)
            found.append((prompt, [text[begin:end] for begin, end in spans]))
        return found

    def _training_prompts(self, labels: np.ndarray) -> list[Prompt]:
        names, templates = self._select(labels)
        return build_detection_prompts(self.tokenizer, names, templates=templates, **self._options)

    def _select(self, labels: np.ndarray) -> tuple[list[str], Templates | None]:
        """Names and training templates of some classes."""
        templates = self._templates
        if templates is not None and not isinstance(templates, str):
            templates = [templates[label] for label in labels]
        return [self.class_names[label] for label in labels], templates

    def _check_ids(self, record: dict[str, Any]) -> None:
        for annotation in record.get("annotations", ()):
            if not 0 <= annotation["category_id"] < len(self.class_names):
                raise ValueError(
                    f"category_id {annotation['category_id']} is none of the contiguous class ids "
                    f"0 to {len(self.class_names) - 1}."
                )

    def _check_one_prompt(self, needed: int) -> None:
        if needed != 1:
            raise ValueError(
                f"{len(self.class_names)} classes need {needed} captions of at most "
                f"{self.max_tokens} tokens, but training shows all of them in one: raise "
                "max_tokens (and max_classes), shorten or remove classes, or train with sampled "
                "classes."
            )


class SampledDetectionPrompter(DetectionPrompter):
    """Asks, in training, for the classes of the image and for a draw of classes that are not in it.

    The way to train with more classes than one caption holds (Objects365, LVIS):

    1. the classes of the image, in random order, are taken while the sum of their tokens stays
       within ``token_budget``; a new order is drawn each time, so that those beyond it rotate;
    2. :func:`draw_num_negatives` says how many other classes to draw; these are taken in random
       order while some of the budget remains;
    3. all are shuffled together and joined.

    Classes of the image that were left out, and those that read like a class of the image, are
    never asked for as absent ones. In evaluation all classes are asked for, as by
    :class:`DetectionPrompter`. Random numbers come from numpy's global generator.

    Args:
        tokenizer, class_names, separator, max_tokens, max_classes, templates, on_empty: as of
            :class:`DetectionPrompter`. A class called ``__background__`` is never drawn.
        num_negatives: most classes to draw that are not in the image.
        control_probabilities: as of :func:`draw_num_negatives`.
        token_budget: limit of a training caption's tokens, special tokens excluded; together
            they never exceed ``max_tokens``. Each class counts with the separator behind it.
        max_total: limit of the classes of a caption, None for no limit.

    Raises:
        ValueError: a class exceeds the budget alone, or an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        class_names: Sequence[str],
        *,
        num_negatives: int = 85,
        control_probabilities: Sequence[float] = (0.05, 0.05, 0.5),
        token_budget: int = 254,
        max_total: int | None = None,
        separator: str = ". ",
        max_tokens: int = 256,
        max_classes: int | None = None,
        templates: Templates | None = None,
        on_empty: str = "error",
    ) -> None:
        if num_negatives < 0:
            raise ValueError(f"num_negatives must not be negative, but is {num_negatives}.")
        if max_total is not None and max_total < 1:
            raise ValueError(f"max_total must be at least 1 (or None), not {max_total}.")
        super().__init__(
            tokenizer,
            class_names,
            separator=separator,
            max_tokens=max_tokens,
            max_classes=max_classes,
            templates=templates,
            on_empty=on_empty,
        )
        self.num_negatives = num_negatives
        self.control_probabilities = _checked_probabilities(control_probabilities)
        special = tokenizer.num_special_tokens_to_add()
        self.token_budget = min(token_budget, max_tokens - special)
        self.max_total = len(self.class_names) if max_total is None else max_total
        # From here on for training. The real caption is measured in the end, too, since tokens of
        # names do not simply add up.
        self._options.update(max_tokens=self.token_budget + special, max_classes=None)
        wordings = self._wordings()
        self.token_counts = self._count_tokens([text + separator for text in wordings])
        # Classes that read the same ("bow_(weapon)", "bow_(ribbon)") share a number.
        self._wording = np.unique(wordings, return_inverse=True)[1].reshape(-1)
        self._drawable = np.array([name != BACKGROUND for name in self.class_names])

    def for_training(self, record: dict[str, Any]) -> tuple[Prompt, list[int]]:
        """A prompt of drawn classes; ``target_ids`` are their contiguous ids.

        An image without annotations gets a caption of one drawn class at least.

        Returns:
            The prompt, and for each annotation the row of its class, -1 where the caption does
            not name it: such a box must be left out, it is neither present nor absent.

        Raises:
            ValueError: a category id is no class, or there is no class to ask for.
        """
        self._check_ids(record)
        labels = np.array([a["category_id"] for a in record.get("annotations", ())], dtype=np.int64)
        in_image = np.unique(labels)
        positives = self._draw_positives(in_image)
        negatives = self._draw_negatives(in_image, positives)
        # What is given up first, where the caption turns out too long, stands at the end.
        chosen = np.concatenate([positives, negatives])
        if not len(chosen):
            raise ValueError("There is no class to ask for: all are called background.")
        order = np.random.permutation(len(chosen))
        prompts = self._training_prompts(chosen[order])
        while len(prompts) > 1:
            order = order[order != order.max()]
            prompts = self._training_prompts(chosen[order])
        return _with_rows(prompts[0], chosen[order], len(self.class_names), record)

    def check(self, record: dict[str, Any], *, is_train: bool) -> None:
        """Raise ValueError where a category id is no class; draws no random number."""
        if is_train:
            self._check_ids(record)

    def _draw_positives(self, in_image: np.ndarray) -> np.ndarray:
        positives = np.random.permutation(in_image)[: self.max_total]
        # The first that does not fit ends the list, even where a later one would.
        total = self.token_counts[positives].cumsum()
        return positives[: np.searchsorted(total, self.token_budget, side="right")]

    def _draw_negatives(self, in_image: np.ndarray, positives: np.ndarray) -> np.ndarray:
        absent = self._drawable.copy()
        absent[np.isin(self._wording, self._wording[in_image])] = False
        candidates = np.random.permutation(np.flatnonzero(absent))
        full = min(self.num_negatives, self.max_total - len(positives), len(candidates))
        number = min(draw_num_negatives(self.control_probabilities, full), full)
        # A caption must ask for something.
        number = max(number, 1 - len(positives))
        negatives = candidates[:number]
        left = self.token_budget - self.token_counts[positives].sum()
        total = self.token_counts[negatives].cumsum()
        # Negatives may not use the budget up, but for the only class of a caption.
        kept = int(np.searchsorted(total, left, side="left"))
        return negatives[: max(kept, 1 - len(positives))]

    def _wordings(self) -> list[str]:
        """What each class adds to a caption."""
        selected = (self._select(np.array([label])) for label in range(len(self.class_names)))
        return [detection_caption(names, templates=templates)[0] for names, templates in selected]

    def _count_tokens(self, texts: list[str]) -> np.ndarray:
        """int64 ``(K,)``, tokens of each class with a separator behind it.

        Raises:
            ValueError: a class does not fit the budget.
        """
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        counts = np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)
        longest = int(counts.argmax())
        if counts[longest] > self.token_budget:
            raise ValueError(
                f"The class {self.class_names[longest]!r} has {counts[longest]} tokens with its "
                f"separator, but a training caption holds {self.token_budget}, so none could ever "
                "name it: give it a shorter name, or raise token_budget (and max_tokens)."
            )
        return counts


def draw_num_negatives(control_probabilities: Sequence[float], full: int) -> int:
    """How many absent classes to ask for, from numpy's global generator.

    Args:
        control_probabilities: of one class, of none and of ``full`` classes; what is missing to 1
            is the probability of any number from 1 to ``full``. A fourth value, which published
            configurations have, is without effect.
        full: the most to ask for.

    Returns:
        0 to ``full``; 1 where ``full`` is 0 and one class, or any number, is drawn.
    """
    one, none, all_of_them = control_probabilities[:3]
    draw = np.random.random()
    if draw < one:
        return 1
    if draw < one + none:
        return 0
    if draw < one + none + all_of_them:
        return full
    return 1 + int(np.random.randint(max(full, 1)))


def _checked_probabilities(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) not in (3, 4):
        raise ValueError(
            "control_probabilities must be the three probabilities of one, no and all negatives "
            f"(a fourth value is ignored), not {tuple(values)}."
        )
    one, none, all_of_them = (float(value) for value in values[:3])
    # Decimal fractions that add up to 1 may exceed it by a rounding error.
    if min(one, none, all_of_them) < 0 or one + none + all_of_them > 1 + 1e-9:
        raise ValueError(
            "The first three control_probabilities must not be negative nor add up to more than "
            f"1, but are {one}, {none}, {all_of_them}."
        )
    return one, none, all_of_them


def _with_rows(
    prompt: Prompt, labels: np.ndarray, num_classes: int, record: dict[str, Any]
) -> tuple[Prompt, list[int]]:
    """The prompt under the labels' ids, and the row of each annotation, -1 for none."""
    row_of = np.full(num_classes, -1, dtype=np.int64)
    row_of[labels] = np.arange(len(labels))
    rows = [int(row_of[a["category_id"]]) for a in record.get("annotations", ())]
    return replace(prompt, target_ids=torch.from_numpy(labels.astype(np.int64))), rows
