"""Reading a configuration file and the ``key=value`` overrides, with plain errors."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fiber_d2.config import add_fiber_config


def load_config(
    config_file: str,
    overrides: Sequence[str],
    on_loaded: Callable[[str], None] = lambda output_dir: None,
) -> DictConfig | CfgNode:
    """The configuration of a run: a DictConfig of a ``.py`` file, a CfgNode of a ``.yaml`` one.

    Args:
        overrides: ``key=value``, for yaml also the pairs ``KEY VALUE`` of Detectron2. A new key
            is an error; ``+key=value`` adds one to a ``.py`` configuration all the same.
        on_loaded: called with the output folder as soon as it is known, which may be before an
            override turns out to be wrong.

    Raises:
        FileNotFoundError: no such file.
        KeyError: an unknown key; the message names it and the closest known ones.
        ValueError: a file or an override that cannot be read.
    """
    if not config_file:
        raise ValueError("--config-file is missing: name a .py or .yaml configuration.")
    if not os.path.isfile(config_file):
        raise FileNotFoundError(
            f"The configuration file {config_file} does not exist (looked for it from "
            f"{os.getcwd()})."
        )
    misplaced = [text for text in overrides if text.startswith("--")]
    if misplaced:
        raise ValueError(
            f"{misplaced[0]} comes after the key=value overrides: put options before them."
        )
    extension = os.path.splitext(config_file)[1]
    if extension == ".py":
        return _load_lazy_config(config_file, overrides, on_loaded)
    if extension in (".yaml", ".yml"):
        return _load_cfg_node(config_file, overrides, on_loaded)
    raise ValueError(f"The configuration file {config_file} has to end in .py, .yaml or .yml.")


def import_user_modules(names: Sequence[str]) -> None:
    """Import modules or files that register data sets, models or evaluators of the user.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: a module that cannot be imported.
    """
    for name in names:
        if name.endswith(".py"):
            _import_file(name)
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--import {name}: {error}. Give a module on PYTHONPATH or the path of a .py file."
            ) from error


def _import_file(path: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--import {path}: the file does not exist.")
    path = os.path.realpath(path)
    # Files of one name in different folders are different modules.
    stem = os.path.splitext(os.path.basename(path))[0]
    name = f"fiber_d2_user_{stem}_{zlib.crc32(path.encode()):08x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Registered first, so that what the module defines can be pickled for loader workers.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(f"--import {path}: {error}") from error


def _load_lazy_config(
    config_file: str, overrides: Sequence[str], on_loaded: Callable[[str], None]
) -> DictConfig:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        cfg = LazyConfig.load(config_file)
    except (SyntaxError, ImportError) as error:
        raise ValueError(f"{config_file} cannot be loaded: {error}") from error
    parsed = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"The override {text!r} cannot be read: {reason}.") from error
    given = [o.value() for o in parsed if o.key_or_group == "train.output_dir"]
    on_loaded(given[-1] if given else OmegaConf.select(cfg, "train.output_dir"))
    for override in parsed:
        if override.is_delete():
            raise ValueError(f"{override.input_line}: overrides cannot delete keys.")
        if not override.is_add():
            check_key(cfg, override.key_or_group)
    try:
        return LazyConfig.apply_overrides(cfg, list(overrides))
    except (OmegaConfBaseException, KeyError) as error:
        raise ValueError(f"The overrides {' '.join(overrides)} do not fit: {error}") from error


def check_key(cfg: DictConfig, key: str) -> None:
    """Raise KeyError where ``key`` (dotted) is neither in ``cfg`` nor an argument of its node."""
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    prefix = ""
    for part in key.split("."):
        if isinstance(node, str) and "${" in node:
            node = OmegaConf.select(cfg, prefix)
            node = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, Mapping) and takes_argument(node, part):
            return
        else:
            raise KeyError(_unknown_key(key, known_keys(cfg)))
        prefix = f"{prefix}.{part}" if prefix else part


def known_keys(cfg: DictConfig) -> list[str]:
    """All dotted keys an override may name, arguments left at their defaults included."""
    return list(_flatten(OmegaConf.to_container(cfg, resolve=False), ""))


def _flatten(node: Any, prefix: str) -> Iterator[str]:
    if isinstance(node, list):
        items: list[tuple[str, Any]] = [(str(index), value) for index, value in enumerate(node)]
    elif isinstance(node, Mapping):
        items = [(key, value) for key, value in node.items() if key != "_target_"]
        items += [(name, None) for name in _arguments(node)[0] if name not in node]
    else:
        return
    for key, value in items:
        yield f"{prefix}{key}"
        yield from _flatten(value, f"{prefix}{key}.")


def _arguments(node: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Names a node's callable takes by keyword, and whether it takes any name at all."""
    target = node.get("_target_")
    if isinstance(target, str):
        target = locate(target)
    if target is None:
        return [], False
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        # Built-in callables have no signature to check against.
        return [], True
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return names, any(p.kind == p.VAR_KEYWORD for p in parameters)


def takes_argument(node: Mapping[str, Any], name: str) -> bool:
    """Whether the callable of a LazyConfig node (as a plain dict) has an argument ``name``."""
    names, any_name = _arguments(node)
    return any_name or name in names


def _unknown_key(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.8)
    if not close:
        # A wrong path with a right last part: "max_iter" for "train.max_iter".
        ends = [name.rsplit(".", 1)[-1] for name in known]
        wanted = set(difflib.get_close_matches(key.rsplit(".", 1)[-1], set(ends), n=3, cutoff=0.8))
        close = [name for name, end in zip(known, ends) if end in wanted][:3]
    hint = f"did you mean {' or '.join(close)}?" if close else "no known key is close to it."
    return f"Unknown configuration key {key!r}: {hint}"


def _load_cfg_node(
    config_file: str, overrides: Sequence[str], on_loaded: Callable[[str], None]
) -> CfgNode:
    cfg = get_cfg()
    add_fiber_config(cfg)
    known = list(_flatten(cfg, ""))
    try:
        # Detectron2 allows executable yaml tags by default.
        cfg.merge_from_file(config_file, allow_unsafe=False)
        pairs = _pairs(overrides)
        given = [value for key, value in zip(pairs[::2], pairs[1::2]) if key == "OUTPUT_DIR"]
        on_loaded(given[-1] if given else cfg.OUTPUT_DIR)
        cfg.merge_from_list(pairs)
    except KeyError as error:
        text = str(error.args[0])
        if "Non-existent" in text:
            raise KeyError(_unknown_key(text.rsplit(": ", 1)[-1], known)) from error
        raise
    except AssertionError as error:
        key = str(error).rsplit(": ", 1)[-1]
        message = _unknown_key(key, known) if "Non-existent" in str(error) else str(error)
        raise KeyError(message) from error
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{config_file} is not a Detectron2 yaml configuration: {error}"
        ) from error
    cfg.freeze()
    return cfg


def _pairs(overrides: Sequence[str]) -> list[str]:
    """Both ``KEY=VALUE`` and Detectron2's ``KEY VALUE`` as the flat list yacs wants."""
    flat: list[str] = []
    for text in overrides:
        is_key = len(flat) % 2 == 0
        flat.extend(text.split("=", 1) if is_key and "=" in text else [text])
    if len(flat) % 2:
        raise ValueError(f"The override {flat[-1]} has no value: write {flat[-1]}=VALUE.")
    return flat
