"""Captions and their spans: does every phrase reach tokens of its prompt?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from fiber_d2.data.builtin import REFEXP
from fiber_d2.text import spans_to_positive_map

from .checks import Finding
from .schema import id_of, where
from .sources import Item, blocks
from .values import Spans, as_spans, is_text, mark_spans, show, whole_caption

_BLOCK = 1024


class Phrase(NamedTuple):
    """What a box or an evaluated phrase is tied to."""

    spans: Spans
    place: dict[str, Any]
    name: str


def spans_of(annotation: dict[str, Any]) -> Any:
    """The spans of an annotation as they stand in the file."""
    return annotation.get("tokens_positive", annotation.get("tokens"))


def check_captions(
    items: Iterable[Item], kind: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Iterator[Finding]:
    """Captions and spans of grounding data and referring expressions.

    Args:
        kind: in "refexp" a box without spans is tied to the whole caption.
        max_tokens: limit of a caption's tokens, special tokens included.
    """
    for block in blocks(items, _BLOCK):
        sound = []
        for item in block:
            caption = item.image.get("caption")
            if is_text(caption) and caption.strip():
                sound.append(item)
            else:
                yield Finding(
                    "caption-entry", f"the caption is {show(caption)}", **where(item.image)
                )
                yield from _check_entries(item)
        if not sound:
            continue
        encoded = tokenizer(
            [item.image["caption"] for item in sound],
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for item, offsets in zip(sound, encoded["offset_mapping"]):
            yield from _check_caption(item, kind, np.asarray(offsets, np.int64), max_tokens)


def _check_entries(item: Item) -> Iterator[Finding]:
    """Without a caption, only whether there are spans at all."""
    for phrase in _phrases(item, whole=None):
        if isinstance(phrase, Finding):
            yield phrase


def _phrases(item: Item, whole: tuple[int, int] | None) -> Iterator[Phrase | Finding]:
    image, annotations = item
    for index, annotation in enumerate(annotations):
        spans = as_spans(spans_of(annotation))
        place = {**where(image), "annotation_id": id_of(annotation, index)}
        if spans is None:
            yield Finding("span-entry", f"tokens_positive {show(spans_of(annotation))}", **place)
        else:
            yield Phrase(spans or ([whole] if whole else []), place, "")
    listed = image.get("tokens_positive_eval")
    if listed is None:
        return
    if not isinstance(listed, (list, tuple)):
        yield Finding("span-entry", f"tokens_positive_eval {show(listed)}", **where(image))
        return
    for index, value in enumerate(listed):
        spans, name = as_spans(value), f"phrase {index} of tokens_positive_eval, "
        if spans is None:
            yield Finding("span-entry", f"{name}{show(value)}", **where(image))
        else:
            yield Phrase(spans, where(image), name)


def _check_caption(
    item: Item, kind: str, offsets: np.ndarray, max_tokens: int
) -> Iterator[Finding]:
    caption = item.image["caption"]
    if len(offsets) > max_tokens:
        yield Finding(
            "caption-long",
            f"{len(offsets)} tokens, special tokens included; the limit is {max_tokens}",
            **where(item.image),
            caption=caption,
        )
    sound: dict[tuple[tuple[int, int], ...], list[Phrase]] = {}
    for phrase in _phrases(item, whole_caption(caption) if kind == REFEXP else None):
        if isinstance(phrase, Finding):
            yield phrase._replace(caption=caption)
            continue
        problems = list(_check_spans(phrase, caption))
        yield from problems
        if phrase.spans and not problems:
            sound.setdefault(tuple(phrase.spans), []).append(phrase)
    if not sound:
        return
    marked = spans_to_positive_map(offsets, sound).numpy() > 0
    # The closing special token takes the last place of a caption that is cut.
    kept = marked[:, : max_tokens - 1].sum(axis=1)
    total = marked.sum(axis=1)
    for index, phrases in enumerate(sound.values()):
        if kept[index] == total[index] > 0:
            continue
        check = "span-cut" if total[index] else "span-no-token"
        for phrase in phrases:
            yield _finding(check, phrase, caption, phrase.spans)


def _check_spans(phrase: Phrase, caption: str) -> Iterator[Finding]:
    if not phrase.spans:
        yield _finding("span-none", phrase, caption, [])
    for begin, end in phrase.spans:
        if begin > end:
            check = "span-reversed"
        elif begin < 0 or end > len(caption):
            check = "span-range"
        elif begin == end:
            check = "span-empty"
        else:
            continue
        yield _finding(check, phrase, caption, [(begin, end)])


def _finding(check: str, phrase: Phrase, caption: str, spans: Spans) -> Finding:
    texts = [f"[{begin}, {end})" for begin, end in spans]
    if check in ("span-no-token", "span-cut"):
        texts = [f"{text} {show(caption[b:e])}" for text, (b, e) in zip(texts, spans)]
    message = f"{phrase.name}{', '.join(texts) or 'no span'}; {len(caption)} characters"
    return Finding(check, message, **phrase.place, caption=mark_spans(caption, spans))
