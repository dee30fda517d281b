"""FIBER's fine-grained stage as a Detectron2 extension; importing it fills the registries."""

from . import config, data, modeling  # noqa: F401

__version__ = "0.1.0"
