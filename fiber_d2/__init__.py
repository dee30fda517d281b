"""FIBER's fine-grained stage as a Detectron2 extension; importing it fills the registries."""

from . import config, data, modeling  # noqa: F401
from .version import __version__ as __version__
