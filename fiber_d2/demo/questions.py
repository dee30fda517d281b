"""What a visitor typed, as a query and as pieces of text that a page can highlight."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fiber_d2.queries import Caption, Classes, Expression, Query

KINDS = ("classes", "caption", "expression")
_NAME = re.compile(r"[^.,;\n]+")


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        query: for the predictor.
        pieces: the text cut up, in order: each piece with the position of the target that it
            names, or None. Together they are the text.
    """

    query: Query
    pieces: list[tuple[str, int | None]]


def understand(text: str, kind: str) -> Question:
    """
    Args:
        text: names between periods, commas, semicolons or line ends; a sentence; or an expression.
        kind: "classes", "caption" or "expression".

    Raises:
        ValueError: another kind, or a text without words.
    """
    text = text.replace("\r\n", "\n")
    if kind not in KINDS:
        raise ValueError(f"The kind of a question is one of {', '.join(KINDS)}, not {kind!r}.")
    if not text.strip(" .,;\n\t"):
        raise ValueError("There is nothing to look for: write some words.")
    if kind == "expression":
        return Question(Expression(text), _cut(text, [(*_trimmed(text, 0, len(text)), 0)]))
    if kind == "caption":
        caption = Caption(text)
        return Question(
            caption, _cut(text, [(b, e, i) for i, p in enumerate(caption.spans) for b, e in p])
        )
    targets: dict[str, int] = {}
    spans = []
    for match in _NAME.finditer(text):
        begin, end = _trimmed(text, match.start(), match.end())
        if begin < end:
            # A name that comes twice is one class.
            target = targets.setdefault(" ".join(text[begin:end].split()), len(targets))
            spans.append((begin, end, target))
    return Question(Classes(list(targets)), _cut(text, spans))


def _trimmed(text: str, begin: int, end: int) -> tuple[int, int]:
    part = text[begin:end]
    begin += len(part) - len(part.lstrip())
    return begin, begin + len(part.strip())


def _cut(text: str, spans: list[tuple[int, int, int]]) -> list[tuple[str, int | None]]:
    pieces: list[tuple[str, int | None]] = []
    done = 0
    for begin, end, target in sorted(spans):
        pieces += [(text[done:begin], None), (text[begin:end], target)]
        done = end
    return [piece for piece in [*pieces, (text[done:], None)] if piece[0]]
