"""Does this project prepare data, and score predictions, as the original did?

    python tools/check_fixtures.py DIRECTORY [--sections a,b,c] [--json OUT]

Compares what this project computes with the files of a fixture directory, section by section
(a: Flickr30k recall, b: referring expressions, ...; one module of ``data_eval`` each). Exit
status 0: everything agrees; 1: something does not, or a section's files are missing or empty; 2: a
bad argument.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# The library and the sections are imported where they are used: that takes seconds, which a
# mistyped argument should not cost.
from data_eval.common import Section  # noqa: E402

PREFIX = "section_"
# Failures printed for a section; the JSON file holds all of them.
SHOWN = 10


class _Parser(argparse.ArgumentParser):
    """Errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def known_sections() -> list[str]:
    """Letters of the sections that have a module."""
    folder = Path(__file__).resolve().parent / "data_eval"
    return sorted(path.stem[len(PREFIX) :] for path in folder.glob(f"{PREFIX}?.py"))


def run_section(module: ModuleType, letter: str, directory: Path) -> Section:
    """The result of a section; what stops it, or an empty one, is a failure of it."""
    try:
        section = module.check(directory)
    except Exception as error:  # a file that is missing, or not of the documented form
        section = Section(letter)
        message = " ".join(str(error).split())
        if not isinstance(error, FileNotFoundError):
            message = f"{type(error).__name__}: {message}"
        section.failures.append(message)
        return section
    if not section.checked:
        section.failures.append("nothing was checked: the section's files hold no case")
    return section


def main(argv: Sequence[str] | None = None) -> int:
    letters = known_sections()
    parser = _Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument(
        "--sections", metavar="a,b,c", help=f"which of {','.join(letters)}; default: all of them"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all failures there, too")
    args = parser.parse_args(argv)
    if args.sections is not None:
        asked = [letter.strip() for letter in args.sections.split(",")]
        unknown = [letter for letter in asked if letter not in letters]
        if unknown:
            parser.error(f"unknown section {unknown[0]!r}: there are {', '.join(letters)}")
        letters = list(dict.fromkeys(asked))
    if not args.directory.is_dir():
        parser.error(f"there is no directory {args.directory}")
    # What evaluators warn about (repeated predictions, ...) is part of the cases.
    logging.getLogger("fiber_d2").setLevel(logging.ERROR)

    report = {}
    for letter in letters:
        module = importlib.import_module(f"data_eval.{PREFIX}{letter}")
        section = run_section(module, letter, args.directory)
        _print(section, _title(module))
        report[letter] = {
            "checked": section.checked,
            "failed": len(section.failures),
            "failures": section.failures,
        }
    if args.json is not None:
        from fiber_d2.files import save_json

        try:
            save_json(report, args.json)
        except OSError as error:
            parser.error(f"{args.json} cannot be written: {error}")
    return int(any(entry["failed"] for entry in report.values()))


def _title(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _print(section: Section, title: str) -> None:
    failed = len(section.failures)
    outcome = "FAILED" if failed else "passed"
    print(f"{section.letter}  {title}: {outcome}, {section.checked} checked, {failed} failed")
    for failure in section.failures[:SHOWN]:
        print(f"     {failure}")
    if failed > SHOWN:
        print(f"     ... and {failed - SHOWN} more")
    for note in section.notes:
        print(f"     note: {note}")


if __name__ == "__main__":
    sys.exit(main())
