"""The version, in this one place: setup.py reads the line below without importing it."""

__version__ = "0.1.0"
