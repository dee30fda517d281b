"""A colour for every word: the same in all pictures, different from its neighbours' in one."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping

Color = tuple[int, int, int]

# Bright, so that dark letters can be read on each, and as far apart as sixteen such colours can
# be (distance in OKLab at least 0.14; two of them that one can just tell apart have 0.02).
PALETTE: tuple[Color, ...] = (
    (255, 0, 255), (75, 255, 0), (0, 165, 240), (255, 165, 150),
    (165, 195, 255), (255, 255, 255), (255, 255, 0), (0, 255, 255),
    (255, 150, 255), (180, 120, 255), (255, 90, 0), (0, 195, 0),
    (180, 150, 75), (240, 90, 165), (195, 210, 105), (60, 195, 165),
)  # fmt: skip
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)")


class WordColors:
    """Colours of the words of a run.

    A word's own colour follows from its letters (CRC-32), so it is the same in every run and
    process. Where two words of a group want the same one, that which comes later in the alphabet
    takes the next colour that no other word of its groups has; so all of a group differ as long as
    the palette and the other groups let them. The order of groups and words does not matter.

    Case and a leading article do not make another word.

    Args:
        groups: words that appear in one picture, for each picture of a data set; or once all that
            is looked for.
    """

    def __init__(self, groups: Iterable[Iterable[str]] = ()) -> None:
        self._known: dict[str, int] = {}
        members: dict[str, list[Counter[int]]] = {}
        for group in groups:
            taken: Counter[int] = Counter()
            for word in {_key(word) for word in group}:
                members.setdefault(word, []).append(taken)
        for word in sorted(members):
            self._known[word] = index = _choose(word, members[word])
            for taken in members[word]:
                taken[index] += 1

    def of(self, words: Iterable[str]) -> dict[str, Color]:
        """Colours of the words of one picture.

        Words of the groups have theirs. Others have their own, or the next one that is free in
        this picture.
        """
        words = list(words)
        indices = {key: self._known[key] for key in map(_key, words) if key in self._known}
        taken = Counter(indices.values())
        for key in sorted({_key(word) for word in words} - set(indices)):
            indices[key] = _choose(key, [taken])
            taken[indices[key]] += 1
        return {word: PALETTE[indices[_key(word)]] for word in words}


def _key(word: str) -> str:
    return _ARTICLE.sub("", " ".join(word.split()).casefold())


def _choose(word: str, taken: Iterable[Mapping[int, int]]) -> int:
    """The least used colour of those taken; of equals the first from the word's own one on."""
    own = zlib.crc32(word.encode("utf-8", "surrogatepass")) % len(PALETTE)
    order = [(own + step) % len(PALETTE) for step in range(len(PALETTE))]
    used: Counter[int] = Counter()
    for counts in taken:
        used.update(counts)
    return min(order, key=lambda index: used[index])
