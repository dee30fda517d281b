"""Ground truth of Flickr30k Entities: boxes per entity (XML) and phrases per sentence (text)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

# "[/EN#283585/people/clothing An older man]": a token that opens with "[" carries the entity id
# and its types, and the phrase ends with the first word that closes with "]".
_PHRASE = re.compile(r"(?<!\S)\[(?P<tag>\S*)\s+(?P<words>.*?)\](?!\S)")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class Phrase:
    """A phrase of a sentence.

    Attributes:
        first_word: index of its first word in the sentence without the markup.
        text: its words.
        entity: id of the entity it refers to.
        types: kinds of entity as written, repeats included ("people", "clothing", ...).
    """

    first_word: int
    text: str
    entity: str
    types: tuple[str, ...]


@dataclass(frozen=True)
class EntityImage:
    """An image of the data set.

    Attributes:
        boxes: entity id to float64 ``(g, 4)``, XYXY in absolute pixels as annotated.
        sentences: the phrases of each sentence, with and without boxes.
    """

    boxes: dict[str, np.ndarray]
    sentences: tuple[tuple[Phrase, ...], ...]

    def evaluable(self, sentence: int) -> tuple[Phrase, ...]:
        """The phrases of a sentence whose entity has at least one box; the others do not count."""
        return tuple(phrase for phrase in self.sentences[sentence] if phrase.entity in self.boxes)

    def merged(self) -> EntityImage:
        """The same image with all boxes of an entity replaced by the one that encloses them."""
        return EntityImage(
            boxes={
                entity: np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])[None]
                for entity, boxes in self.boxes.items()
            },
            sentences=self.sentences,
        )


def image_key(image_id: int | str) -> str:
    """One spelling for ids that are numbers in json files and texts in file names."""
    text = str(image_id)
    return str(int(text)) if text.isdecimal() else text


def parse_boxes(xml: str) -> dict[str, np.ndarray]:
    """Boxes of each entity of an ``Annotations/<image>.xml`` text, in file order.

    An object without a box (``nobndbox``, ``scene``) adds nothing; one with several names adds
    its box to each. Raises ValueError on what is not such an XML.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ValueError(f"not XML ({error})") from error
    boxes: dict[str, list[list[float]]] = {}
    for item in root.iter("object"):
        corners = item.find("bndbox")
        if corners is None:
            continue
        values = [corners.findtext(name) for name in _CORNERS]
        if None in values:
            raise ValueError(f"a bndbox lacks one of {', '.join(_CORNERS)}")
        for name in item.findall("name"):
            boxes.setdefault((name.text or "").strip(), []).append([float(v) for v in values])
    return {entity: np.asarray(rows, dtype=np.float64) for entity, rows in boxes.items()}


def parse_sentences(text: str) -> tuple[tuple[Phrase, ...], ...]:
    """Phrases of each sentence of a ``Sentences/<image>.txt`` text; blank lines do not count."""
    return tuple(_parse_sentence(line) for line in text.splitlines() if line.strip())


def parse_image(xml: str, sentences: str) -> EntityImage:
    """An image from the contents of its two files."""
    return EntityImage(boxes=parse_boxes(xml), sentences=parse_sentences(sentences))


def read_entities(root: str | Path, split: str) -> dict[str, EntityImage]:
    """All images named in ``<root>/<split>.txt``, by ``image_key``.

    Raises:
        FileNotFoundError: where the list, an XML or a sentence file is missing.
        ValueError: where a file cannot be read, or the list is empty.
    """
    root = Path(root)
    names = _read(root / f"{split}.txt", root).split()
    if not names:
        raise ValueError(f"{root / f'{split}.txt'} names no image.")
    images = {}
    for name in names:
        xml = _read(root / "Annotations" / f"{name}.xml", root)
        sentences = _read(root / "Sentences" / f"{name}.txt", root)
        try:
            images[image_key(name)] = parse_image(xml, sentences)
        except ValueError as error:
            raise ValueError(f"Flickr30k Entities image {name} in {root}: {error}.") from error
    return images


def all_boxes(image: EntityImage) -> np.ndarray:
    """Every different annotated box of an image, float64 ``(n, 4)``."""
    return np.unique(np.concatenate([np.zeros((0, 4)), *image.boxes.values()]), axis=0)


def _parse_sentence(line: str) -> tuple[Phrase, ...]:
    phrases = []
    words_before = 0
    end = 0
    for match in _PHRASE.finditer(line):
        words_before += len(line[end : match.start()].split())
        words = match["words"].split()
        parts = match["tag"].split("/")
        if len(parts) < 2 or not parts[1].startswith("EN#"):
            raise ValueError(f"a phrase without an entity id (/EN#...): {match[0]!r}")
        phrases.append(Phrase(words_before, " ".join(words), parts[1][3:], tuple(parts[2:])))
        words_before += len(words)
        end = match.end()
    return tuple(phrases)


def _read(path: Path, root: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. {root} must hold the Flickr30k Entities files: <split>.txt, "
            "Annotations/<image>.xml and Sentences/<image>.txt."
        )
    return path.read_text(encoding="utf-8")
