"""What the sections of ``check_fixtures.py`` share: comparisons that are counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# Length of one failure's text.
MAX_TEXT = 200


class Section:
    """Counts comparisons and collects readable failures.

    Comparisons made within ``with section.case("name"):`` carry the case's name, and an exception
    there is one failure of the case, after which the section goes on.

    Attributes:
        letter: of the section.
        checked: comparisons made, failed ones included.
        failures: a line for each failed comparison, at most ``MAX_TEXT`` characters.
        notes: what was left out on purpose, and why.
    """

    def __init__(self, letter: str) -> None:
        self.letter = letter
        self.checked = 0
        self.failures: list[str] = []
        self.notes: list[str] = []
        self._cases: list[str] = []

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Name the comparisons made within; an exception counts as a failure of this case."""
        self._cases.append(name)
        try:
            yield
        except Exception as error:  # whatever the library under test raises is a finding
            self.checked += 1
            self._fail("", f"{type(error).__name__}: {error}")
        finally:
            self._cases.pop()

    def note(self, text: str) -> None:
        """Say, once, what is not compared and why."""
        if text not in self.notes:
            self.notes.append(text)

    def true(self, what: str, condition: Any) -> bool:
        """``condition`` holds."""
        return self._count(what, bool(condition), "is not so")

    def equal(self, what: str, found: Any, expected: Any) -> bool:
        """Both are the same: numbers, text, lists, dicts; arrays as lists, tuples as lists."""
        found, expected = _plain(found), _plain(expected)
        return self._count(what, _same(found, expected), lambda: _first_difference(found, expected))

    def close(self, what: str, found: Any, expected: Any, tolerance: float) -> bool:
        """Same shape, and no element differs by more than ``tolerance``; NaN never passes."""
        try:
            found = np.asarray(_plain(found), dtype=np.float64)
            expected = np.asarray(_plain(expected), dtype=np.float64)
        except (TypeError, ValueError) as error:
            return self._count(what, False, f"cannot be compared as numbers: {error}")
        if found.shape != expected.shape:
            text = f"found the shape {found.shape}, expected {expected.shape}"
            return self._count(what, False, text)
        # Equal infinities agree; their difference would be NaN.
        difference = np.zeros_like(found)
        np.subtract(found, expected, out=difference, where=found != expected)
        bad = ~(np.abs(difference) <= tolerance)
        if not bad.any():
            return self._count(what, True, "")
        place = np.unravel_index(np.flatnonzero(bad)[0], bad.shape)
        where = f" at {[int(i) for i in place]}" if place else ""
        return self._count(
            what,
            False,
            f"found {found[place]:.9g}, expected {expected[place]:.9g}{where} "
            f"({int(bad.sum())} of {bad.size} beyond {tolerance:g})",
        )

    def raises(self, what: str, function: Callable[[], Any], *types: type[BaseException]) -> bool:
        """``function()`` raises one of ``types`` (any Exception where none is given)."""
        kinds: tuple[type[BaseException], ...] = types or (Exception,)
        try:
            result = function()
        except kinds:
            return self._count(what, True, "")
        except Exception as error:
            names = " or ".join(kind.__name__ for kind in kinds)
            text = f"raised {type(error).__name__}: {error}; expected {names}"
            return self._count(what, False, text)
        return self._count(what, False, f"raised nothing and gave {result!r}")

    def _count(self, what: str, good: bool, text: str | Callable[[], str]) -> bool:
        self.checked += 1
        if not good:
            self._fail(what, text if isinstance(text, str) else text())
        return good

    def _fail(self, what: str, text: str) -> None:
        name = ", ".join([*self._cases, *([what] if what else [])])
        line = " ".join(f"{name}: {text}".split())
        self.failures.append(line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3] + "...")


def read_json(directory: Path, name: str) -> Any:
    """The content of a fixture file.

    Raises:
        FileNotFoundError: it is not in the directory.
        ValueError: it is not JSON.
    """
    path = Path(directory) / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is missing in {directory}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad json as well as bad utf-8
        raise ValueError(f"{path} is not JSON: {error}") from error


def _plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists, recursively."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def _same(found: Any, expected: Any) -> bool:
    # True == 1 in Python, but a fixture that says true does not mean 1.
    if isinstance(found, bool) != isinstance(expected, bool):
        return False
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            _same(found[key], expected[key]) for key in found
        )
    return bool(found == expected)


def _first_difference(found: Any, expected: Any) -> str:
    """Where two values part, with the surroundings left out."""
    where = ""
    while True:
        if isinstance(found, list) and isinstance(expected, list):
            if len(found) != len(expected):
                where += f" (lengths {len(found)} and {len(expected)})"
                break
            key = next(i for i in range(len(found)) if not _same(found[i], expected[i]))
        elif isinstance(found, dict) and isinstance(expected, dict):
            if found.keys() != expected.keys():
                keys = sorted(map(str, found.keys() ^ expected.keys()))
                where += f" (keys only in one: {', '.join(keys)[:60]})"
                break
            key = next(k for k in found if not _same(found[k], expected[k]))
        else:
            break
        found, expected, where = found[key], expected[key], f"{where}[{key!r}]"
    place = f" at {where.strip()}" if where else ""
    return f"found {_cut(found)}, expected {_cut(expected)}{place}"


def _cut(value: Any, limit: int = 70) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
