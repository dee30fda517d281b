"""The site builds, and every warning of mkdocs (a link that leads nowhere, say) is an error."""

import subprocess
import sys

import pytest

from .conftest import REPOSITORY


@pytest.mark.slow
def test_build(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is of the extra `docs`, part of `dev`")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "fiber_d2.predictor.Predictor" in reference and "Look for something" in reference
    assert ":func:" not in reference and ":class:" not in reference
    assert (tmp_path / "site" / "datasets.html").is_file()
