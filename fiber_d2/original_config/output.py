"""Translate yaml files of the original FIBER into a recipe of ours and what to change in it.

    fiber-d2 convert config BASE.yaml [TASK.yaml ...] [--eval-only] [--output RECIPE.py]
                            [KEY VALUE ...]

Files and KEY VALUE pairs are merged in this order, as in the original, whose defaults hold for what
none of them sets. Prints the command that starts the recipe, and the fields that it does not carry
over, has no use for, or does not know. --output writes a recipe of its own instead of overrides.
With --eval-only it is one that evaluates; files that train on their test set mean that anyway.
`python tools/convert_config.py` is the same. Exit status 2 and one message if the files are not
FIBER's.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from textwrap import wrap
from typing import Any

from fiber_d2.engine.durable import write_atomically
from fiber_d2.engine.errors import EXPECTED_ERRORS, USAGE_EXIT_CODE, PlainRunError, message_of

from .files import read_files
from .translate import Translation, equal, translate

MODULE = "my_datasets.py"
WEIGHTS = "train.init_checkpoint"


def changes(result: Translation) -> dict[str, Any]:
    """Keys and values that make the recipe what ``result`` wants; notes what it cannot be."""
    from omegaconf import OmegaConf

    cfg = _load(result)
    found: dict[str, Any] = dict(result.needed)
    for key, value in result.wanted.items():
        missing = None
        name, _, argument = key.partition(".")
        if name in ("RandomFlip", "ResizeShortestEdge"):
            place = _augmentation(cfg, name)
            if place is None:
                if name == "RandomFlip" and value:
                    result.notes["AUGMENT.FLIP_PROB_TRAIN"] = "the recipe does not mirror images"
                continue
            # Detectron2's default.
            key, missing = f"{place}.{argument}", 0.5 if name == "RandomFlip" else None
        present = OmegaConf.select(cfg, key, default=missing)
        if OmegaConf.is_config(present):
            present = OmegaConf.to_container(present, resolve=True)
        if not equal(present, value):
            found[key] = value
    return found


def _load(result: Translation) -> Any:
    needed = (f"{key}={as_override(value)}" for key, value in result.needed.items())
    return _load_recipe(result.recipe, tuple(needed))


@lru_cache(maxsize=1)
def _load_recipe(recipe: str, overrides: tuple[str, ...]) -> Any:
    from fiber_d2.engine.overrides import load_config
    from fiber_d2.predictor_settings import find_config

    return load_config(find_config(recipe), overrides)


def _augmentation(cfg: Any, name: str) -> str | None:
    for index, node in enumerate(cfg.dataloader.train.augmentations):
        if name in str(node["_target_"]):
            return f"dataloader.train.augmentations.{index}"
    return None


def as_override(value: Any) -> str:
    """A value as ``key=value`` overrides have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(as_override(item) for item in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][\w./+-]*", value):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return format(value, ".10g") if isinstance(value, float) else str(value)


def _remarks(result: Translation) -> list[str]:
    lines: list[str] = []
    if result.unknown:
        lines += ["", "Not known:", *(f"  {key}" for key in result.unknown)]
    for title, notes in (("Not carried over as it is", result.notes), ("Inert", result.inert)):
        by_reason: dict[str, list[str]] = {}
        for key, reason in notes.items():
            by_reason.setdefault(reason, []).append(key)
        if by_reason:
            lines += ["", f"{title}:"]
            for reason, keys in by_reason.items():
                lines += wrap(f"{', '.join(keys)}: {reason}", 96, initial_indent="  ",
                              subsequent_indent="    ", break_on_hyphens=False)  # fmt: skip
    return lines[1:]


def as_command(result: Translation) -> str:
    """A command with overrides, a module that registers data sets where it needs one, remarks."""
    lines = []
    if result.registered:
        lines += [f"# {MODULE}; paths as in the yaml, which looks for them below DATASET/, too"]
        lines += ["from fiber_d2.data import register_coco_json", ""]
        for data in result.registered:
            arguments = ", ".join(f"{key}={value!r}" for key, value in data.arguments().items())
            lines += [f"register_coco_json({arguments})"]
        lines += [""]
    command = f"python train_net.py --config-file configs/{result.recipe}"
    command += " --eval-only" if result.recipe.startswith("eval/") else ""
    command += f" --import {MODULE}" if result.registered else ""
    overrides = [f"{key}={as_override(value)}" for key, value in changes(result).items()]
    if WEIGHTS not in result.wanted:
        overrides.append(f"{WEIGHTS}=FILE.pth")
    lines.append(" \\\n    ".join([command, *map(shlex.quote, overrides)]))
    remarks = [f"# {line}".rstrip() for line in _remarks(result)]
    return "\n".join([*lines, *(["", *remarks] if remarks else [])]) + "\n"


def as_recipe(result: Translation, source: str) -> str:
    """A LazyConfig file of its own.

    Args:
        source: what it was made from, for its first line.
    """
    changed = changes(result)
    names = sorted(str(name) for name in _load(result))
    evaluates = " --eval-only" if result.recipe.startswith("eval/") else ""
    weights = "" if WEIGHTS in result.wanted else f" {WEIGHTS}=FILE.pth"
    text = [
        f'"""{source} of the original FIBER: configs/{result.recipe}, changed where they differ.',
        "",
        f"    train_net.py --config-file THIS_FILE.py{evaluates}{weights}",
        *[line.replace("\\", "\\\\").replace('"""', "'''") for line in ["", *_remarks(result)]],
        '"""',
        "",
    ]
    if result.registered:
        text += ["from detectron2.config import LazyCall as L"]
    text += ["from detectron2.config import LazyConfig", ""]
    if result.registered:
        text += ["from fiber_d2.data import register_coco_json"]
    text += [
        "from fiber_d2.predictor_settings import find_config",
        "",
        f"{', '.join(names)} = LazyConfig.load(",
        f"    find_config({result.recipe!r}), {names!r}",
        ")",
        "",
    ]
    if result.registered:
        text += [
            "# Paths as in the yaml, which looks for them below DATASET/, too.",
            "register = {",
        ]
        for data in result.registered:
            arguments = ", ".join(f"{key}={value!r}" for key, value in data.arguments().items())
            text += [f"    {data.name!r}: L(register_coco_json)({arguments}),"]
        text += ["}"]
    text += [f"{_attribute(key)} = {_plain(value)!r}" for key, value in changed.items()]
    return "\n".join(text).rstrip() + "\n"


def _attribute(key: str) -> str:
    return re.sub(r"\.(\d+)", r"[\1]", key)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(format(value, ".10g"))
    return list(value) if isinstance(value, tuple) else value


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", metavar="FILE.yaml ... [KEY VALUE ...]")
    parser.add_argument("--eval-only", action="store_true", help="a recipe that evaluates")
    parser.add_argument("--output", metavar="RECIPE.py", help="write a recipe of its own")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The program; its exit status."""
    args = build_parser(prog).parse_intermixed_args(argv)
    words = args.words
    number = next(
        (n for n, word in enumerate(words) if not word.endswith((".yaml", ".yml"))), len(words)
    )
    try:
        if not number:
            raise ValueError("Name a .yaml file of the original first.")
        original = read_files(words[:number], words[number:])
        result = translate(original, eval_only=args.eval_only)
        if args.output:
            source = " and ".join(Path(name).name for name in words[:number])
            text = as_recipe(result, source)
            write_atomically(args.output, lambda file: file.write(text.encode()))
            remarks = "".join(f"{line}\n" for line in _remarks(result))
            sys.stdout.write(f"{args.output}: from configs/{result.recipe}\n{remarks}")
        else:
            sys.stdout.write(as_command(result))
    except (*EXPECTED_ERRORS, OSError, PlainRunError) as error:
        sys.stderr.write(f"{prog or 'convert_config'}: error: {message_of(error)}\n")
        return USAGE_EXIT_CODE
    return 0
