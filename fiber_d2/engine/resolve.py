"""From what a user gave to what is run: settings that follow from others, and the whole as text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .scaling import scale_to_batch_size
from .tuning import configure_tuning


def resolve_config(cfg: DictConfig | CfgNode, *, eval_only: bool = False) -> None:
    """Complete a configuration, in place, by what follows from it without looking at data.

    Doing it again changes nothing.

    Raises:
        ValueError: as of :func:`~fiber_d2.engine.tuning.configure_tuning` and
            :func:`~fiber_d2.engine.scaling.scale_to_batch_size`.
    """
    configure_tuning(cfg)
    if not eval_only:
        scale_to_batch_size(cfg)


def config_text(cfg: DictConfig | CfgNode) -> str:
    """The configuration as yaml, interpolations replaced by their values.

    Raises:
        ValueError: an interpolation points nowhere.
    """
    if isinstance(cfg, CfgNode):
        return cfg.dump()
    try:
        tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ValueError(f"The configuration is not complete: {error}") from error
    return yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    """Mappings, lists, numbers and text only: classes and functions by their dotted names."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)
