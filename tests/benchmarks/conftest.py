"""The scripts import each other as siblings; the small model is that of the model's own tests."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def load():
    """``load(name)``: a module of benchmarks/."""
    before = list(sys.path)
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    yield importlib.import_module
    sys.path[:] = before


@pytest.fixture(scope="session")
def build():
    """``build(query_norm=False, ...)``: a small model."""
    path = REPOSITORY / "tests" / "modeling" / "conftest.py"
    spec = importlib.util.spec_from_file_location("small_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_small_model
