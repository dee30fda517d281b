"""Yaml files of the original FIBER, translated into recipes of ours.

`fiber-d2 convert config` and `tools/convert_config.py` are its program.
"""

from .files import Original, read_files
from .output import as_command, as_recipe, main
from .translate import Translation, translate

__all__ = [
    "Original",
    "Translation",
    "as_command",
    "as_recipe",
    "main",
    "read_files",
    "translate",
]
