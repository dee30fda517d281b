"""Every file below configs/: it loads, and nothing in it is misspelt."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig, OmegaConf

from fiber_d2.engine.overrides import load_config, takes_argument

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.py"))
RECIPES = [name for name in FILES if not name.startswith("common/")]
YAML_FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


# The recipes of ODinW look for its sets when they are loaded.
pytestmark = pytest.mark.usefixtures("catalog")


def nodes(tree: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All nodes that are built by calling something, with their dotted keys."""
    if isinstance(tree, Mapping):
        if "_target_" in tree:
            yield place, tree
        items = tree.items()
    else:
        items = enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from nodes(value, f"{place}.{key}" if place else str(key))


def misspelt(cfg: DictConfig) -> list[str]:
    """Keys of arguments that what they are for does not take."""
    return [
        f"{place}.{name}"
        for place, node in nodes(OmegaConf.to_container(cfg, resolve=False))
        for name in node
        if name != "_target_" and not takes_argument(node, name)
    ]


@pytest.mark.parametrize("name", FILES)
def test_arguments(name):
    cfg = LazyConfig.load(str(CONFIGS / name))
    assert misspelt(cfg) == []


@pytest.mark.parametrize("name", RECIPES)
def test_references_and_run_settings(name):
    cfg = LazyConfig.load(str(CONFIGS / name))
    OmegaConf.resolve(cfg)
    assert {"model", "dataloader", "train"} <= set(cfg)
    known = LazyConfig.load(str(CONFIGS / "common" / "train.py"), "train")
    assert set(cfg.train) <= set(known), "run settings that configs/common/train.py lacks"


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml(name):
    assert isinstance(load_config(str(CONFIGS / name), []), CfgNode)


def test_typing_errors_are_found(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from detectron2.data.transforms import RandomFlip\n"
        "from detectron2.config import LazyConfig\n"
        f"model = LazyConfig.load('{CONFIGS}/common/models/fiber_b.py', 'model')\n"
        "model.backbone.vision.widnow = 7\n"
        "steps = [L(RandomFlip)(prob=0.5), dict(inner=L(RandomFlip)(propb=0.5))]\n"
        "other = dict(steps=steps)\n"
    )
    assert misspelt(LazyConfig.load(str(path))) == [
        "model.backbone.vision.widnow",
        "other.steps.1.inner.propb",
    ]
