"""``python -m benchmarks NAME [OPTIONS]`` runs a script of this folder; no name, list of them."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def scripts() -> dict[str, Path]:
    """Names and files of what can be run; the other modules here are parts of them."""
    return {
        path.stem: path
        for path in sorted(FOLDER.glob("*.py"))
        if not path.stem.startswith("_") and 'if __name__ == "__main__":' in path.read_text("utf-8")
    }


def listing() -> str:
    """One line for each script."""
    found = scripts()
    width = max(len(name) for name in found)
    lines = []
    for name, path in found.items():
        about = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        lines.append(f"  {name:<{width}}  {about.splitlines()[0]}")
    return "\n".join(["usage: python -m benchmarks NAME [OPTIONS]", "", *lines, ""])


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(listing())
        return 0
    name, *rest = argv
    path = scripts().get(name.replace("-", "_"))
    if path is None:
        sys.stderr.write(f"error: there is no benchmark {name!r}\n\n{listing()}")
        return 2
    # As `python benchmarks/NAME.py` would: its neighbours are importable, and it can start itself.
    sys.path.insert(0, str(FOLDER))
    sys.argv = [str(path), *rest]
    runpy.run_path(str(path), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
