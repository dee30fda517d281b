"""What one may ask about an image: classes, the phrases of a caption, or one expression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from transformers import PreTrainedTokenizerFast

from fiber_d2.data.captions import DetectionPrompter
from fiber_d2.data.mapper import GroundingPrompter
from fiber_d2.structures import Prompt
from fiber_d2.text.spans import Span

_DETERMINERS = frozenset(
    "all a an the this that these those his her its their my your our some any every each another "
    "both several many two three four five six seven eight nine ten".split()
)
# Words that stand between noun phrases and in none of them.
_BREAKS = frozenset(
    "about above across against along among and around as at away behind below beneath beside "
    "besides between beyond but by down during for from in inside into near next nor of off on "
    "onto or out outside over past through throughout to toward towards under underneath until up "
    "upon via while with within without "
    "am are be been being can could did do does had has have is may might must shall should was "
    "were will would "
    "he i it she that they there we who whom whose which what where when why how you him them us "
    "me himself herself itself themselves not no also just very then than because so if "
    "carrying doing eating flying going holding jumping leaning looking lying making parked "
    "playing riding running seated sitting sleeping standing talking using waiting walking "
    "watching wearing".split()
)
# "the cup left of the plate": no part of the phrase where "of" or "to" follows.
_SIDES = frozenset("ahead back bottom front left right side top".split())
_WORD = re.compile(r"[^\W_]+(?:['’\-&][^\W_]+)*")


@dataclass(frozen=True)
class Classes:
    """All objects of some classes.

    Attributes:
        names: of the classes; ``pred_classes`` are positions in it.
        templates: other words around the names: a format such as ``"a {} on a road"``, or for each
            class a mapping with any of ``prefix``, ``name`` and ``suffix``.
    """

    names: Sequence[str]
    # Mappings have no hash; that of the names is enough.
    templates: str | Sequence[Mapping[str, str]] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise ValueError(
                f"Classes are a list of names, not the one text {self.names!r}: write "
                f"[{self.names!r}]."
            )
        object.__setattr__(self, "names", tuple(self.names))
        wrong = [name for name in self.names if not isinstance(name, str)]
        if wrong or not self.names:
            found = repr(wrong[0]) if wrong else "none"
            raise ValueError(f"Classes are a list of one name or more, but there is {found}.")
        if self.templates is not None and not isinstance(self.templates, str):
            # Copied, since questions are remembered with what they stand for.
            object.__setattr__(self, "templates", [dict(entry) for entry in self.templates])

    @property
    def words(self) -> list[str]:
        return list(self.names)

    def prompts(
        self, tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any]
    ) -> list[Prompt]:
        options = dict(settings)
        if self.templates is not None:
            options["templates"] = self.templates
        return DetectionPrompter(tokenizer, self.names, **options).prompts


@dataclass(frozen=True)
class Caption:
    """The objects that the phrases of a sentence mean.

    Attributes:
        text: the sentence.
        spans: for each phrase its ``(begin, end)`` characters, as many pairs as it has parts; a
            single pair may stand for a list of one. None finds the phrases by
            :func:`find_noun_phrases`; ``pred_classes`` are positions in this list.
    """

    text: str
    spans: Sequence[Span | Sequence[Span]] | None = None

    def __post_init__(self) -> None:
        _check_text(self.text)
        phrases = find_noun_phrases(self.text) if self.spans is None else self.spans
        if not len(phrases):
            raise ValueError(f"The caption {self.text!r} is given no phrase to look for.")
        object.__setattr__(self, "spans", tuple(_pairs(self.text, phrase) for phrase in phrases))

    @property
    def words(self) -> list[str]:
        return [" ... ".join(self.text[b:e].strip() for b, e in phrase) for phrase in self.spans]

    def prompts(
        self, tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any]
    ) -> list[Prompt]:
        prompter = GroundingPrompter(tokenizer, max_tokens=settings["max_tokens"])
        return [prompter.for_evaluation({"caption": self.text, "tokens_positive_eval": self.spans})]


@dataclass(frozen=True)
class Expression:
    """The one object that a whole expression means, such as "the man left of the tree".

    Attributes:
        text: the expression.
    """

    text: str

    def __post_init__(self) -> None:
        _check_text(self.text)

    @property
    def words(self) -> list[str]:
        return [self.text.strip()]

    def prompts(
        self, tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any]
    ) -> list[Prompt]:
        prompter = GroundingPrompter(
            tokenizer, max_tokens=settings["max_tokens"], whole_caption=True
        )
        return [prompter.for_evaluation({"caption": self.text})]


Query = Union[Classes, Caption, Expression]
QUERIES = (Classes, Caption, Expression)


def as_query(text: str | Iterable[str] | Query) -> Query:
    """A query as it is; a text as a :class:`Caption`; a list of texts as :class:`Classes`.

    Raises:
        ValueError: nothing of these, or an empty text or list.
    """
    if isinstance(text, QUERIES):
        return text
    if isinstance(text, str):
        return Caption(text)
    if isinstance(text, Iterable):
        return Classes(list(text))
    raise ValueError(
        f"The text to look for is {text!r}; give a list of class names, a caption, or one of "
        "Classes, Caption and Expression of fiber_d2.queries."
    )


def find_noun_phrases(caption: str) -> list[list[Span]]:
    """Stretches of an English caption that may be noun phrases, found by a few rules.

    A phrase ends at every punctuation mark, at words that stand between phrases (prepositions,
    conjunctions, pronouns, forms of be, have and do, some frequent participles), and before an
    article, a possessive or a number word up to ten, which begins the next one. A word directly
    before that, with an article and another word before it, is taken for a verb ("a dog *chases*
    a cat") and left out, and so is a side before "of" or "to" ("the cup *left* of the plate").
    Articles belong to the phrase. A caption without any phrase is one.

    There is no grammar in this: a verb followed by a bare noun ("a dog chases cats") stays within
    one phrase, and so does an adverb; names that contain a preposition are cut in two ("chest of
    drawers"). Where it matters give the spans.

    Returns:
        For each phrase a list of one ``(begin, end)`` pair of characters.
    """
    words = list(_WORD.finditer(caption))
    phrases: list[list[re.Match[str]]] = [[]]
    for index, word in enumerate(words):
        text = word.group().lower()
        gap = caption[words[index - 1].end() : word.start()] if index else ""
        if gap.strip():
            phrases.append([])
        if text in _DETERMINERS:
            current = phrases[-1]
            if len(current) >= 3 and _is_determiner(current[0]):
                current.pop()
            # "all the", "these two": one phrase.
            if not current or not all(map(_is_determiner, current)):
                phrases.append([])
        elif text in _BREAKS:
            current = phrases[-1]
            if text in ("of", "to") and current and current[-1].group().lower() in _SIDES:
                current.pop()
            phrases.append([])
            continue
        phrases[-1].append(word)
    spans = [
        [(phrase[0].start(), phrase[-1].end())]
        for phrase in phrases
        if not all(map(_is_determiner, phrase))
    ]
    whole = (len(caption) - len(caption.lstrip()), len(caption.rstrip()))
    return spans or [[whole]]


def _is_determiner(word: re.Match[str]) -> bool:
    return word.group().lower() in _DETERMINERS


def _check_text(text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"A caption or expression is a text with words in it, not {text!r}.")


def _pairs(text: str, phrase: Any) -> tuple[Span, ...]:
    """The parts of a phrase, a single part included."""
    try:
        if len(phrase) == 2 and not any(isinstance(part, Sequence) for part in phrase):
            phrase = [phrase]
        return tuple((int(begin), int(end)) for begin, end in phrase)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"A phrase of the caption {text!r} is given as {phrase!r}; give (begin, end) "
            "characters, or a list of such pairs."
        ) from error
