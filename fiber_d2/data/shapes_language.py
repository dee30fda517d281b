"""Words for shapes: descriptions, the objects they fit, and sentences made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from .shapes_params import ANY_SHAPE, NUMBERS, SHAPES
from .shapes_scene import Scene, ShapeObject

VOWELS = "aeiou"
MAX_PHRASES = 4

OPENINGS = (
    "",
    "",
    "there we see",
    "one can see",
    "look at",
    "this picture shows",
    "someone drew",
    "the drawing is of",
    "{picture} of",
)
JOINTS = ("and", "and", "together with", "as well as")
ENDINGS = ("", "", "", "in one picture", "on {background}", "against {background}")
AGAIN = ("; now find {again}", "; notice {again} too")


@dataclass(frozen=True)
class Description:
    """Words that objects may fit. At least one of the three is given.

    Attributes:
        size: "small", "large" or None for any size; ``color`` and ``shape`` likewise.
    """

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def words(self, plural: bool = False) -> str:
        noun = ANY_SHAPE[plural] if self.shape is None else self.shape
        if self.shape is not None and plural:
            noun = SHAPES[self.shape]
        return " ".join(word for word in (self.size, self.color, noun) if word)

    def fits(self, shape: ShapeObject) -> bool:
        return (
            self.size in (None, shape.size)
            and self.color in (None, shape.color)
            and self.shape in (None, shape.shape)
        )

    def matches(self, objects: Sequence[ShapeObject]) -> tuple[int, ...]:
        """Indices of the objects that fit.

        Empty where a size word would be unclear, because an object that fits the other words is
        of a size between small and large.
        """
        if self.size is not None:
            others = Description(color=self.color, shape=self.shape)
            if any(others.fits(shape) and shape.size is None for shape in objects):
                return ()
        return tuple(i for i, shape in enumerate(objects) if self.fits(shape))

    def kinds(self) -> list[str]:
        """Which words are used: some of "size", "colour" and "shape"."""
        used = {"size": self.size, "colour": self.color, "shape": self.shape}
        return [kind for kind, word in used.items() if word]


def descriptions_of(shape: ShapeObject) -> list[Description]:
    """All descriptions the object fits, from the fullest to the shortest."""
    sizes = (shape.size, None) if shape.size else (None,)
    found = [
        Description(*words) for words in product(sizes, (shape.color, None), (shape.shape, None))
    ]
    return [description for description in found if description.kinds()]


def with_article(words: str) -> str:
    return f"{'an' if words[0] in VOWELS else 'a'} {words}"


@dataclass(frozen=True)
class Phrase:
    """A run of words of a sentence and the objects it names.

    Attributes:
        first, last: indices of the first word and of the word after the last.
        objects: indices into the scene's objects; empty for what has no box.
        types: Flickr30k Entities types, here the kinds of words used.
    """

    first: int
    last: int
    objects: tuple[int, ...]
    types: tuple[str, ...]


@dataclass(frozen=True)
class Sentence:
    words: tuple[str, ...]
    phrases: tuple[Phrase, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def char_span(self, phrase: Phrase) -> tuple[int, int]:
        """Characters [begin, end) of a phrase in ``text``."""
        begin = sum(len(word) + 1 for word in self.words[: phrase.first])
        return begin, begin + len(" ".join(self.words[phrase.first : phrase.last]))


class _Writer:
    """Collects words and remembers which of them are phrases."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.phrases: list[Phrase] = []

    def say(self, text: str) -> None:
        self.words.extend(text.split())

    def name(self, text: str, objects: tuple[int, ...], types: Sequence[str]) -> None:
        first = len(self.words)
        self.say(text)
        self.phrases.append(Phrase(first, len(self.words), objects, tuple(types)))


def _noun_phrase(
    description: Description, count: int, rng: np.random.Generator, definite: bool = False
) -> tuple[str, list[str]]:
    """Words and types of a phrase for all ``count`` objects that fit the description."""
    types = description.kinds()
    if count == 1:
        if definite or rng.random() < 0.4:
            return f"the {description.words()}", types
        return with_article(description.words()), types
    draw = rng.random()
    if draw < 0.15 and not definite:  # "a red circle": any of them will do
        return with_article(description.words()), types
    plural = description.words(plural=True)
    if draw < 0.7 and not definite:
        return f"{NUMBERS[count]} {plural}", [*types, "plural"]
    return f"the {plural}", [*types, "plural"]


def _pick_phrases(
    scene: Scene, rng: np.random.Generator
) -> list[tuple[Description, tuple[int, ...]]]:
    """Descriptions of groups of objects, no object in two of them, in random order."""
    options: dict[Description, tuple[int, ...]] = {}
    for shape in scene.objects:
        for description in descriptions_of(shape):
            found = description.matches(scene.objects)
            if found:
                options[description] = found
    # Names of things come most often; bare "the large shapes" are rarer.
    weights = {
        name: (0.0, 1.0, 3.0, 2.0)[len(name.kinds())] * (0.4 if name.shape is None else 1.0)
        for name in options
    }
    wanted = int(rng.integers(1, MAX_PHRASES + 1))
    chosen: list[tuple[Description, tuple[int, ...]]] = []
    while options and len(chosen) < wanted:
        names = list(options)
        weight = np.array([weights[name] for name in names])
        name = names[int(rng.choice(len(names), p=weight / weight.sum()))]
        chosen.append((name, options[name]))
        used = set(options[name])
        options = {k: v for k, v in options.items() if not used & set(v)}
    return chosen


def make_sentence(scene: Scene, rng: np.random.Generator) -> Sentence:
    """One true sentence about a scene, lower case, ending in " ." as tokenised captions do."""
    chosen = _pick_phrases(scene, rng)
    writer = _Writer()

    def fill(template: str) -> None:
        for word in template.split():
            if word == "{picture}":
                writer.name("a picture", (), ("notvisual",))
            elif word == "{background}":
                writer.name(with_article(f"{scene.background} background"), (), ("scene",))
            elif word == "{again}":
                description, found = chosen[int(rng.integers(len(chosen)))]
                text, types = _noun_phrase(description, len(found), rng, definite=True)
                writer.name(text, found, types)
            else:
                writer.say(word)

    fill(OPENINGS[int(rng.integers(len(OPENINGS)))])
    for place, (description, found) in enumerate(chosen):
        if 0 < place < len(chosen) - 1:
            writer.say(",")
        elif place:
            writer.say(JOINTS[int(rng.integers(len(JOINTS)))])
        text, types = _noun_phrase(description, len(found), rng)
        writer.name(text, found, types)
    fill(ENDINGS[int(rng.integers(len(ENDINGS)))])
    if rng.random() < 0.1:
        fill(AGAIN[int(rng.integers(len(AGAIN)))])
    writer.say(".")
    return Sentence(tuple(writer.words), tuple(writer.phrases))


def make_sentences(scene: Scene, count: int, rng: np.random.Generator) -> list[Sentence]:
    """Up to ``count`` different sentences about a scene."""
    found: dict[str, Sentence] = {}
    for _ in range(4 * count):
        if len(found) == count:
            break
        sentence = make_sentence(scene, rng)
        found.setdefault(sentence.text, sentence)
    return list(found.values())
