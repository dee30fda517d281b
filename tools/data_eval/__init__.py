"""Checks of fixture directories, one module for each section; see ``tools/check_fixtures.py``."""
