"""Links between pages lead to files and headings that exist."""

import re

import pytest

from .conftest import PAGES, REPOSITORY

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def without_code(markdown):
    return re.sub(r"```.*?```|`[^`]*`", "", markdown, flags=re.DOTALL)


def anchors_of(path):
    """Headings as GitHub and mkdocs name them."""
    markdown = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", markdown, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    path = REPOSITORY / page
    for target in LINK.findall(without_code(path.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_relative_to(REPOSITORY) and file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors_of(file), f"{page}: {target}"
