"""Source distribution and wheel: built, installed and used outside of the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import fiber_d2

REPOSITORY = Path(__file__).parents[2]
NAME = f"fiber_d2-{fiber_d2.__version__}"

# What a clean clone has; builds leave their traces beside it, not in the checkout.
SOURCES = (
    "configs",
    "csrc",
    "datasets",
    "fiber_d2",
    "tools",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
    "train_net.py",
)

SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"

SMOKE_TEST = """
import importlib.metadata
import sys
from pathlib import Path

site, version = Path(sys.argv[1]), sys.argv[2]

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

import fiber_d2
from fiber_d2.engine.overrides import load_config
from fiber_d2.text import build_detection_prompts, load_tokenizer

assert Path(fiber_d2.__file__).is_relative_to(site), fiber_d2.__file__
assert fiber_d2.__version__ == version
(distribution,) = importlib.metadata.distributions(name="fiber_d2", path=[str(site)])
assert distribution.version == version
for script in distribution.entry_points.select(group="console_scripts"):
    assert callable(script.load()), script

assert "FIBER" in META_ARCH_REGISTRY and "build_fiber_fusion_backbone" in BACKBONE_REGISTRY
assert {"odinw_Aquarium_test", "flickr30k_val", "shapes_detection_val"} <= set(DatasetCatalog)

configs = site / "fiber_d2" / "configs"
recipes = sorted(str(path.relative_to(configs)) for path in configs.rglob("*.py"))
# Pieces are not complete; those of ODinW look for its data when they are loaded.
recipes = [name for name in recipes if not name.startswith(("common/", "eval/odinw"))]
for name in recipes:
    load_config(str(configs / name), [])
load_config(str(configs / "FIBER-B.yaml"), [])

tokenizer = load_tokenizer("shapes")
(prompt,) = build_detection_prompts(tokenizer, ["red circle", "blue square"])
model = instantiate(LazyConfig.load(str(configs / "common/models/fiber_tiny.py")).model).eval()
image = {"image": torch.zeros(3, 64, 96), "height": 64, "width": 96, "prompt": prompt}
with torch.no_grad():
    (result,) = model([image])
assert result["instances"].image_size == (64, 96)
print("recipes", len(recipes))
"""


def run(*command, cwd, **environment):
    """A command without the compiled operators and the checkout; its output."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "FIBER_D2_BUILD_OPS": "0", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    clone = folder / "clone"
    clone.mkdir()
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            # A data set may lie, or be linked, below datasets/.
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
            if name == "datasets":
                clone.joinpath(name).mkdir()
                for path in [*source.glob("*.py"), source / "README.md"]:
                    shutil.copy(path, clone / name)
                source, name = source / "prepare", "datasets/prepare"
            shutil.copytree(source, clone / name, ignore=ignored)
        else:
            shutil.copy(source, clone / name)
    run(sys.executable, "-c", SDIST, folder, cwd=clone)
    return folder / f"{NAME}.tar.gz"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Made from the source distribution, so that nothing can be missing in that."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    return folder / f"{NAME}-py3-none-any.whl"


def test_one_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == fiber_d2.__version__
    assert (REPOSITORY / "setup.py").read_text().count(fiber_d2.__version__) == 0


@pytest.mark.slow
def test_contents(sdist, wheel):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    packed = {*SOURCES, "csrc/deform_conv.cpp", "datasets/validate.py", "configs/quickstart.py"}
    assert packed <= names | {"datasets"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {
        f"fiber_d2/configs/{path.relative_to(REPOSITORY / 'configs')}"
        for path in (REPOSITORY / "configs").rglob("*")
        if path.suffix in (".py", ".yaml", ".md")
    }
    assert configs <= names
    assert {"fiber_d2/text/assets/shapes_tokenizer.json", "fiber_d2/version.py"} <= names
    page = {"index.html", "demo.css", "demo.js"}
    assert {f"fiber_d2/demo/static/{name}" for name in page} <= names
    # Names that belong to others, were they installed beside the package.
    top_level = {name.split("/")[0] for name in names}
    assert top_level == {"fiber_d2", f"{NAME}.dist-info"}


@pytest.mark.slow
def test_installed_wheel_works_without_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    script = tmp_path / "smoke_test.py"
    script.write_text(SMOKE_TEST)
    # The path comes before an editable installation, which looks for its modules last.
    out = run(
        sys.executable,
        script,
        site,
        fiber_d2.__version__,
        cwd=tmp_path,
        PYTHONPATH=str(site),
        DETECTRON2_DATASETS=str(tmp_path / "none"),
    )
    assert int(out.split("recipes")[-1]) > 20
