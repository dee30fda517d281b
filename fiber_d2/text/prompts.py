"""Captions out of class names, phrases or expressions, and which tokens belong to which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Union

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from fiber_d2.structures import Prompt

from .spans import Span, spans_to_positive_map

Templates = Union[str, Sequence[Mapping[str, str]]]
"""How to word classes: a format such as ``"a {} on a road"``, or for each class a mapping with
``prefix``, ``name`` and ``suffix``."""

_EMPTY_CHOICES = ("error", "keep")
_OVERFLOW_CHOICES = ("error", "truncate")


def clean_name(name: str) -> str:
    """A class name as it is put into a caption.

    What stands between the first ``(`` and the last ``)`` is deleted, underscores become spaces,
    and each pair of spaces becomes one, once. Outer spaces and the case stay.
    """
    name = re.sub(r"\(.*\)", "", name)
    return name.replace("_", " ").replace("  ", " ")


def build_grounding_prompt(
    tokenizer: PreTrainedTokenizerFast,
    caption: str,
    spans: Sequence[Iterable[Span]],
    *,
    max_tokens: int = 256,
    on_empty: str = "error",
    on_overflow: str = "error",
) -> Prompt:
    """The prompt of a sentence whose phrases are given by their characters.

    Args:
        tokenizer: from :func:`~fiber_d2.text.load_tokenizer`.
        caption: the sentence.
        spans: for each target, its ``(begin, end)`` characters of the caption, as many pairs as
            needed. A target that is given no pair at all keeps a row of zeros.
        max_tokens: limit of the caption's tokens, special tokens included.
        on_empty: ``"error"``, or ``"keep"`` to let a target whose spans meet no token have a row
            of zeros.
        on_overflow: ``"error"``, or ``"truncate"`` to leave out what of the caption exceeds
            ``max_tokens``, as the original trains on long captions. A span whose end is cut off
            meets no token. ``text`` stays the whole caption.

    Returns:
        A prompt with one target for each entry of ``spans`` and ``target_ids`` 0, 1, ...

    Raises:
        ValueError: the caption has too many tokens, a span is reversed or outside of the caption,
            or the spans of a target meet no token.
    """
    _check_choice("on_empty", on_empty, _EMPTY_CHOICES)
    _check_choice("on_overflow", on_overflow, _OVERFLOW_CHOICES)
    per_target = [[(int(begin), int(end)) for begin, end in target] for target in spans]
    for index, target in enumerate(per_target):
        for begin, end in target:
            if not 0 <= begin <= end <= len(caption):
                what = "is reversed" if begin > end else "lies outside of the caption"
                raise ValueError(
                    f"Target {index} of the caption {shorten(caption)!r}: the span [{begin}, {end})"
                    f" {what}, which has {len(caption)} characters."
                )
    tokens = _tokenize(tokenizer, caption)
    if len(tokens) > max_tokens:
        if on_overflow == "error":
            raise ValueError(
                f"The caption {shorten(caption)!r} has {len(tokens)} tokens (special tokens "
                f"included), but the limit is {max_tokens}: shorten or split it, or raise "
                "max_tokens where the model's text tower allows more."
            )
        tokens = _tokenize(tokenizer, caption, limit=max_tokens)
    positive_map = spans_to_positive_map(tokens.offsets, per_target)
    if on_empty == "error":
        empty = [index for index in _empty_rows(positive_map) if per_target[index]]
        if empty:
            target = per_target[empty[0]]
            words = [caption[begin:end] for begin, end in target]
            raise ValueError(
                f"Target {empty[0]} of the caption {shorten(caption)!r} covers no token: its spans "
                f"{target} read {words}. Correct the spans or drop the target."
            )
    return tokens.prompt(positive_map, torch.arange(len(per_target)))


def build_detection_prompts(
    tokenizer: PreTrainedTokenizerFast,
    class_names: Sequence[str],
    *,
    max_tokens: int = 256,
    max_classes: int | None = None,
    separator: str = ". ",
    templates: Templates | None = None,
    suppressed: Sequence[str] = (),
    lead: str = "",
    on_empty: str = "error",
) -> list[Prompt]:
    """The prompts that ask for all the classes, as few as the limits allow, none cutting a class.

    A caption reads ``name + separator + name ...`` without a separator at its end. The tokens of
    a class are those of its name alone.

    Args:
        tokenizer: from :func:`~fiber_d2.text.load_tokenizer`.
        class_names: ``K`` names; cleaned by :func:`clean_name`.
        max_tokens: limit of each caption's tokens, special tokens included.
        max_classes: limit of each caption's classes, None for no limit.
        separator: what stands between two classes.
        templates: other words around the names: a format with ``{}`` or ``{name}`` for the
            cleaned name, or for each class (counted over all captions) a mapping with ``prefix``,
            ``name`` and ``suffix``, whose name is used as it is.
        suppressed: further names at the end of every caption that are no class.
        lead: words at the beginning of every caption, such as ``"object detection : "``.
        on_empty: ``"error"``, or ``"keep"`` to let a class without tokens have a row of zeros.

    Returns:
        Prompts whose ``target_ids`` are positions in ``class_names``, in order.

    Raises:
        ValueError: there is no class, a class has no token of its own, a single class exceeds
            ``max_tokens``, or the templates do not fit.
    """
    _check_choice("on_empty", on_empty, _EMPTY_CHOICES)
    worded = _word_classes(class_names, templates)
    if max_classes is not None and max_classes < 1:
        raise ValueError(f"max_classes must be at least 1 (or None), not {max_classes}.")
    if on_empty == "error":
        for given, (_, name, _) in zip(class_names, worded):
            if not name.strip():
                raise ValueError(_no_token_message(given, name))

    def tokenize(start: int, stop: int) -> tuple[_Tokens, list[tuple[int, int]]]:
        text, spans = _join(worded[start:stop], separator, suppressed, lead)
        return _tokenize(tokenizer, text), spans

    prompts = []
    for start, stop in _chunks(tokenize, class_names, max_tokens, max_classes):
        tokens, spans = tokenize(start, stop)
        positive_map = spans_to_positive_map(tokens.offsets, [[span] for span in spans])
        if on_empty == "error":
            empty = _empty_rows(positive_map)
            if empty:
                index = start + empty[0]
                raise ValueError(_no_token_message(class_names[index], worded[index][1]))
        prompts.append(tokens.prompt(positive_map, torch.arange(start, stop)))
    return prompts


def detection_caption(
    class_names: Sequence[str],
    *,
    separator: str = ". ",
    templates: Templates | None = None,
    suppressed: Sequence[str] = (),
    lead: str = "",
) -> tuple[str, list[tuple[int, int]]]:
    """The caption that asks for all the classes, whatever its length.

    Args:
        class_names, separator, templates, suppressed, lead: as of
            :func:`build_detection_prompts`.

    Returns:
        The caption, and for each class the ``(begin, end)`` characters of its name in it.

    Raises:
        ValueError: there is no class, or the templates do not fit.
    """
    return _join(_word_classes(class_names, templates), separator, suppressed, lead)


def clean_templates(templates: Templates | None) -> Templates | None:
    """The templates with every name cleaned by :func:`clean_name`.

    The original uses the names of its templates as they are in evaluation, but cleans them in
    training.
    """
    if templates is None or isinstance(templates, str):
        return templates
    return [
        {**entry, "name": clean_name(entry["name"])} if "name" in entry else entry
        for entry in templates
    ]


def shorten(text: str, limit: int = 100) -> str:
    """``text`` for a message: cut where it is long."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True)
class _Tokens:
    """A tokenised caption: ids and ``(begin, end)`` characters of each token."""

    text: str
    ids: list[int]
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def prompt(self, positive_map: torch.Tensor, target_ids: torch.Tensor) -> Prompt:
        return Prompt(
            text=self.text,
            input_ids=torch.tensor(self.ids, dtype=torch.int64),
            attention_mask=torch.ones(len(self.ids), dtype=torch.bool),
            positive_map=positive_map,
            target_ids=target_ids,
        )


def _tokenize(
    tokenizer: PreTrainedTokenizerFast, text: str, *, limit: int | None = None
) -> _Tokens:
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=limit is not None,
        max_length=limit,
    )
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return _Tokens(text, list(encoded["input_ids"]), offsets)


def _empty_rows(positive_map: torch.Tensor) -> list[int]:
    return torch.nonzero(positive_map.sum(dim=1) == 0).flatten().tolist()


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {choices}, not {value!r}.")


def _no_token_message(given: str, name: str) -> str:
    return (
        f"The class {given!r} reads {name!r} in the caption and has no token of its own there, so "
        "nothing could ever be found for it: rename it, or remove it from the classes."
    )


def _word_classes(
    class_names: Sequence[str], templates: Templates | None
) -> list[tuple[str, str, str]]:
    """``(prefix, name, suffix)`` of each class."""
    if isinstance(class_names, str) or len(class_names) == 0:
        raise ValueError(f"class_names must be a list of one name or more, not {class_names!r}.")
    cleaned = [clean_name(name) for name in class_names]
    if templates is None:
        return [("", name, "") for name in cleaned]
    if isinstance(templates, str):
        parts = re.split(r"\{(?:name)?\}", templates)
        if len(parts) != 2:
            raise ValueError(
                f"The template {templates!r} must hold {{}} or {{name}} exactly once, in the place "
                "of the class name."
            )
        return [(parts[0], name, parts[1]) for name in cleaned]
    if len(templates) < len(class_names):
        raise ValueError(
            f"There are {len(templates)} templates for {len(class_names)} classes; every class "
            "needs its own, in the order of the classes."
        )
    return [
        (entry.get("prefix", ""), entry.get("name", name), entry.get("suffix", ""))
        for entry, name in zip(templates, cleaned)
    ]


def _join(
    worded: Sequence[tuple[str, str, str]], separator: str, suppressed: Sequence[str], lead: str
) -> tuple[str, list[tuple[int, int]]]:
    """The caption, and the characters of each class's name in it."""
    pieces = ["".join(parts) for parts in worded]
    spans, position = [], len(lead)
    for (prefix, name, _), piece in zip(worded, pieces):
        begin = position + len(prefix)
        spans.append((begin, begin + len(name)))
        position += len(piece) + len(separator)
    return lead + separator.join([*pieces, *suppressed]), spans


def _chunks(
    tokenize: Callable[[int, int], tuple[_Tokens, list[tuple[int, int]]]],
    class_names: Sequence[str],
    max_tokens: int,
    max_classes: int | None,
) -> list[tuple[int, int]]:
    """``(start, stop)`` of each caption's classes: every caption takes as many as it can hold."""
    total = len(class_names)
    chunks, start = [], 0
    while start < total:
        most = total if max_classes is None else min(start + max_classes, total)
        tokens, spans = tokenize(start, most)
        stop = most
        if len(tokens) > max_tokens:
            # A first guess from the long caption, then exact counts: names may share tokens with
            # what stands next to them, so counts of single names do not simply add up.
            ends = np.asarray(spans)[:, 1]
            overflow = tokens.offsets[max(max_tokens - 1, 0), 0]
            stop = max(start + int((ends <= overflow).sum()), start + 1)
            while stop > start + 1 and len(tokenize(start, stop)[0]) > max_tokens:
                stop -= 1
            while stop < most and len(tokenize(start, stop + 1)[0]) <= max_tokens:
                stop += 1
            needed = len(tokenize(start, start + 1)[0])
            if needed > max_tokens:
                raise ValueError(
                    f"The class {shorten(class_names[start])!r} alone makes a caption of {needed} "
                    f"tokens (special tokens included), but the limit is {max_tokens}: give it a "
                    "shorter name, or raise max_tokens where the model's text tower allows more."
                )
        chunks.append((start, stop))
        start = stop
    return chunks
