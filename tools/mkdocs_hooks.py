"""Pages of the repository that lie outside of docs/, for mkdocs, and links between all of them.

mkdocs calls the functions. Links of the pages are for readers of the repository: here those to
other pages lead to the built ones, and those to files that are no pages become their text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Page: file.
PAGES = {
    "index.md": "README.md",
    "configs.md": "configs/README.md",
    "datasets.md": "datasets/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
}
FILES = {path: uri for uri, path in PAGES.items()}
ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>~?([\w.]+)</code>")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Pages that `nav` does not list come last."""
    listed = set(re.findall(r"[\w-]+\.md", str(config["nav"])))
    others = sorted({path.name for path in (ROOT / "docs").glob("*.md")} - listed)
    if others:
        config["nav"].append({"More": others})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for uri, path in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the repository into links of the site."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return LINK.sub(lambda match: _link(match, posixpath.dirname(source)), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings, such as ``:func:`~package.name```, become the name."""
    return ROLE.sub(lambda match: f"<code>{match[1].rsplit('.', 1)[-1]}</code>", html)


def _link(match: re.Match[str], folder: str) -> str:
    image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
    path = posixpath.normpath(posixpath.join(folder, target))
    if not target or "://" in target or not (ROOT / path).exists():
        return match[0]
    if path in FILES:
        return f"{image}[{text}]({FILES[path]}{anchor})"
    if path.startswith("docs/"):
        return f"{image}[{text}]({path[len('docs/') :]}{anchor})"
    return text
