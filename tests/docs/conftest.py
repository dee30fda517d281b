"""The pages, and the blocks of code in them."""

import re
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "docs/*.md", "configs/*.md", "datasets/*.md", "benchmarks/*.md")
    for path in REPOSITORY.glob(pattern)
)


class Block(NamedTuple):
    """A block of code: its language, "" of an indented one; its first line, from 1; its text."""

    language: str
    line: int
    text: str


def blocks_of(markdown):
    """Fenced and indented blocks, in order."""
    blocks, lines, number = [], markdown.splitlines(), 0
    while number < len(lines):
        fence = re.match(r"\s*```(\w*)", lines[number])
        if fence:
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
            blocks.append(Block(fence[1], number + 2, "\n".join(lines[number + 1 : end])))
            number = end
        elif lines[number].startswith("    ") and not lines[number - 1].strip():
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(line[4:] for line in lines[number:end])
            blocks.append(Block("", number + 1, text))
            number = end - 1
        number += 1
    return blocks
