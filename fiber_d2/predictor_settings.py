"""Configurations as a predictor sees them: found by name, and what they say of prediction."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.data import detection_utils as utils
from detectron2.modeling import build_model
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn


@dataclass(frozen=True)
class Settings:
    """What a configuration says of prediction.

    Attributes:
        build: makes the model, on the CPU and with random weights.
        weights: checkpoint file, or empty.
        kind_of_weights: "model" or "ema".
        tokenizer: as of :func:`~fiber_d2.text.load_tokenizer`.
        image_format: channel order that the model is shown.
        augmentations: Detectron2's, which make a model input of an image.
        prompts: arguments of :func:`~fiber_d2.text.build_detection_prompts`.
    """

    build: Callable[[], nn.Module]
    weights: str
    kind_of_weights: str
    tokenizer: str
    image_format: str
    augmentations: list[Any]
    prompts: dict[str, Any]


def settings_of(cfg: Any) -> Settings:
    """
    Raises:
        ValueError: a configuration of another kind, or one that lacks something.
    """
    if isinstance(cfg, CfgNode):
        return _of_cfg_node(cfg)
    if isinstance(cfg, DictConfig):
        return _of_lazy_config(cfg)
    raise ValueError(
        f"A configuration of the type {type(cfg).__name__} is not known: give a LazyConfig, a "
        "CfgNode, the path of a .py or .yaml file, or the name of one that comes with fiber_d2."
    )


def _of_cfg_node(cfg: CfgNode) -> Settings:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"  # until the weights are there
    return Settings(
        build=lambda: build_model(cfg),
        weights=cfg.MODEL.WEIGHTS,
        kind_of_weights=cfg.FIBER.TRAIN.WEIGHTS,
        tokenizer=cfg.FIBER.TOKENIZER,
        image_format=cfg.INPUT.FORMAT,
        augmentations=utils.build_augmentation(cfg, is_train=False),
        prompts={
            "max_tokens": cfg.FIBER.MAX_TOKENS,
            "separator": cfg.FIBER.SEPARATOR,
            "max_classes": None,
            "templates": None,
        },
    )


def _of_lazy_config(cfg: DictConfig) -> Settings:
    test = OmegaConf.select(cfg, "dataloader.test")
    node = test[0] if isinstance(test, ListConfig) and test else test
    if "model" not in cfg or not isinstance(node, DictConfig):
        raise ValueError(
            "The configuration needs a `model`, and in `dataloader.test` a test set that says how "
            "images are resized and which tokenizer is used."
        )
    train = cfg.get("train") or {}
    try:
        templates = node.get("templates")
        return Settings(
            build=lambda: instantiate(cfg.model),
            weights=train.get("init_checkpoint") or "",
            kind_of_weights=train.get("weights") or "model",
            tokenizer=node.tokenizer,
            image_format=node.get("image_format", "BGR"),
            augmentations=list(instantiate(node.augmentations)),
            prompts={
                "max_tokens": node.get("max_tokens", 256),
                "separator": node.get("separator", ". "),
                "max_classes": node.get("max_classes"),
                # Those of single classes are for the classes of the data set.
                "templates": templates if isinstance(templates, str) else None,
            },
        )
    except OmegaConfBaseException as error:
        raise ValueError(f"The configuration is not complete: {error}") from error


def shipped_configs() -> list[str]:
    """Names of the configurations that come with this package."""
    root = _config_root()
    return sorted(
        path.relative_to(root).with_suffix("").as_posix()
        for pattern in ("*.py", "*.yaml", "*/*.py")
        for path in root.glob(pattern)
        if path.parent.name != "common"
    )


def find_config(name_or_path: str | os.PathLike[str]) -> str:
    """The path of a configuration that is given by its path or by the name of a shipped one.

    Raises:
        FileNotFoundError: neither.
    """
    given = os.fspath(name_or_path)
    if os.path.isfile(given):
        return given
    root = _config_root()
    for extension in ("", ".py", ".yaml"):
        path = root / (given + extension)
        if path.is_file():
            return os.fspath(path)
    raise FileNotFoundError(
        f"The configuration {given} is neither a file (looked for it from {os.getcwd()}) nor one "
        f"of those that come with fiber_d2: {', '.join(shipped_configs())}."
    )


def _config_root() -> Path:
    # In a wheel the recipes are inside of the package, in a checkout beside it.
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
