"""Starting weights of the two towers (the model specification, sections 8 and 9)."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .convert import StateDict, check_variant, convert_fiber_state_dict, is_fiber_state_dict
from .files import list_problems, read_file, shorten, state_dict_of
from .names import (
    OUR_ROBERTA,
    OUR_SWIN,
    ROBERTA,
    ROBERTA_FUSION_TABLE,
    ROBERTA_TABLE,
    SWIN,
    SWIN_FUSION_TABLE,
    SWIN_TABLE,
    NameMap,
    Table,
    is_unused,
    strip_prefixes,
)

logger = logging.getLogger(__name__)

# Of Swin classifiers: what a detector has no use for.
_SWIN_UNUSED = (
    r"head\..+",  # classifier (timm: head.fc)
    r"norm\.(weight|bias)",  # of the classifier's input; ours norms each stage's output
    r"absolute_pos_embed",  # never on in published Swin
    r"layers\.\d+\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)",
)
_ROBERTA_UNUSED = (r"lm_head\..+", r"pooler\..+", r"classifier\..+", r"embeddings\.position_ids")
# Of the coarse-grained stage: what only its own tasks use.
_COARSE_UNUSED = (
    r"cross_modal_.+",
    r"(mlm|itm)_score\..+",
    r"(vqa|nlvr2|rank)_\w+\..+",
    r"(image|text)_\w*queue|queue_\w+|temp",
)
_COARSE_SWIN, _COARSE_ROBERTA = "vit_model.", "text_transformer."
_TIMM_DOWNSAMPLE = re.compile(r"layers\.(\d+)\.downsample\.")


class Initialized(NamedTuple):
    """What an initialisation did.

    Attributes:
        loaded: our names that got weights from the file.
        resized: those of them whose position bias was interpolated.
        dropped: names of the file without a use here.
        kept: our names of the same tower that keep their initial values.
    """

    loaded: list[str]
    resized: list[str]
    dropped: list[str]
    kept: list[str]


def initialize_from_swin(
    model: nn.Module, source: str | os.PathLike[str] | StateDict
) -> Initialized:
    """Vision tower from an image classifier, Microsoft's Swin files or timm's.

    A relative position bias of another window is interpolated (bicubic). Output norms and the
    reading of text keep their initial values.

    Args:
        model: a :class:`~fiber_d2.modeling.FIBER`.
        source: a file or a state dict; ``{"model": ...}`` and ``{"state_dict": ...}`` are opened.

    Raises:
        FileNotFoundError: no such file.
        ValueError: entries missing, unknown or of another shape, which the message lists.
    """
    weights, label = _read(source)
    weights = _timm_to_microsoft(weights)
    return _load_tower(model, weights, label, SWIN_TABLE, OUR_SWIN, _SWIN_UNUSED)


def initialize_from_roberta(
    model: nn.Module, source: str | os.PathLike[str] | StateDict
) -> Initialized:
    """Text tower from Hugging Face's RoBERTa; language-model head and pooler are dropped.

    Args:
        model: a :class:`~fiber_d2.modeling.FIBER`.
        source: a file (``pytorch_model.bin``, ``model.safetensors``), the folder with one, or a
            state dict; names with or without ``roberta.``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: entries missing, unknown or of another shape, which the message lists.
    """
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        names = [os.path.join(source, n) for n in ("model.safetensors", "pytorch_model.bin")]
        source = next((name for name in names if os.path.isfile(name)), names[-1])
    weights, label = _read(source)
    weights = {strip_prefixes(name, ("roberta.",)): tensor for name, tensor in weights.items()}
    return _load_tower(model, weights, label, ROBERTA_TABLE, OUR_ROBERTA, _ROBERTA_UNUSED)


def initialize_from_fiber(
    model: nn.Module, source: str | os.PathLike[str] | StateDict
) -> Initialized:
    """Both towers and their exchange from FIBER weights: coarse-grained or fine-grained.

    Coarse-grained files call the towers ``vit_model.`` and ``text_transformer.``; inside, names
    follow the same rules. What a file lacks (coarse-grained: output norms, pyramid, head) keeps its
    initial values. A position bias of another window is interpolated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: entries missing from the towers, unknown or of another shape.
    """
    weights, label = _read(source)
    weights = {strip_prefixes(name): tensor for name, tensor in weights.items()}
    dropped = []
    if not is_fiber_state_dict(weights):
        renamed = {}
        for name, tensor in weights.items():
            if name.startswith(_COARSE_SWIN):
                rest = name[len(_COARSE_SWIN) :]
                if is_unused(rest, _SWIN_UNUSED):
                    dropped.append(name)
                else:
                    renamed[SWIN + rest] = tensor
            elif name.startswith(_COARSE_ROBERTA):
                renamed[ROBERTA + name[len(_COARSE_ROBERTA) :]] = tensor
            elif is_unused(name, _COARSE_UNUSED):
                dropped.append(name)
            else:
                renamed[name] = tensor  # conversion reports it
        weights = renamed
    converted = convert_fiber_state_dict(weights)
    dropped.extend(name for name in weights if is_unused(name))
    state = model.state_dict()
    check_variant(converted, state)
    inverse = NameMap(
        [
            (OUR_SWIN + ours, theirs)
            for theirs, ours in (*SWIN_TABLE, *SWIN_FUSION_TABLE)
            if not ours.startswith("out_norms")
        ]
        + [(OUR_ROBERTA + ours, theirs) for theirs, ours in (*ROBERTA_TABLE, *ROBERTA_FUSION_TABLE)]
    )
    needed = [name for name in state if inverse(name) is not None]
    return _load(model, state, converted, needed, list(state), dropped, [], label)


def interpolate_position_bias(table: torch.Tensor, window: int) -> torch.Tensor:
    """A relative position bias for another window.

    Args:
        table: ``((2w - 1)**2, heads)`` for a window of w tokens.
        window: the new one.

    Returns:
        ``((2 * window - 1)**2, heads)``, bicubic in the two displacements; float32 arithmetic.
    """
    old, new = math.isqrt(table.shape[0]), 2 * window - 1
    if old == new:
        return table
    grid = table.float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.reshape(-1, new * new).T.to(table.dtype).contiguous()


def _read(source: str | os.PathLike[str] | StateDict) -> tuple[dict[str, torch.Tensor], str]:
    if isinstance(source, Mapping):
        return state_dict_of(source, "state dict"), "The state dict"
    path = os.fspath(source)
    return state_dict_of(read_file(path), path), f"The checkpoint {path}"


def _timm_to_microsoft(weights: StateDict) -> dict[str, torch.Tensor]:
    """timm merges patches at the start of a stage, Microsoft at the end of the one before."""
    stages = {int(m[1]) for m in map(_TIMM_DOWNSAMPLE.match, weights) if m}
    if not stages or 0 in stages:
        return dict(weights)
    return {
        _TIMM_DOWNSAMPLE.sub(lambda m: f"layers.{int(m[1]) - 1}.downsample.", name): tensor
        for name, tensor in weights.items()
    }


def _load_tower(
    model: nn.Module,
    weights: StateDict,
    label: str,
    table: Table,
    prefix: str,
    unused: Sequence[str],
) -> Initialized:
    to_ours = NameMap(table)
    converted, dropped, unknown = {}, [], []
    for name, tensor in weights.items():
        ours = to_ours(name)
        if ours is not None:
            converted[prefix + ours] = tensor
        elif is_unused(name, unused):
            dropped.append(name)
        else:
            unknown.append(f"{name} {tuple(tensor.shape)}")
    state = model.state_dict()
    tower = [name for name in state if name.startswith(prefix)]
    to_theirs = to_ours.inverse
    needed = [name for name in tower if to_theirs(name[len(prefix) :]) is not None]
    return _load(model, state, converted, needed, tower, dropped, unknown, label)


def _load(
    model: nn.Module,
    state: StateDict,
    converted: dict[str, torch.Tensor],
    needed: Sequence[str],
    tower: Sequence[str],
    dropped: list[str],
    unknown: list[str],
    label: str,
) -> Initialized:
    resized, shapes, fitted = [], [], {}
    for name, tensor in converted.items():
        if name not in state:
            unknown.append(f"{name} {tuple(tensor.shape)}")
            continue
        target = state[name].shape
        if name.endswith("relative_position_bias_table") and tensor.shape[1:] == target[1:]:
            if tensor.shape != target:
                tensor = interpolate_position_bias(tensor, (math.isqrt(target[0]) + 1) // 2)
                resized.append(name)
        if tensor.shape != target:
            shapes.append(f"{name} {tuple(tensor.shape)} instead of {tuple(target)}")
        fitted[name] = tensor
    missing = [f"{name} {tuple(state[name].shape)}" for name in needed if name not in fitted]
    problems = list_problems(
        {"missing": missing, "unknown": unknown, "of another shape": shapes}, 20
    )
    if problems:
        raise ValueError(f"{label} does not fit the model. Entries {problems}.")
    model.load_state_dict(fitted, strict=False)
    result = Initialized(
        loaded=list(fitted),
        resized=resized,
        dropped=dropped,
        kept=[name for name in tower if name not in fitted],
    )
    logger.info(
        "%s: %d entries loaded, %d of them interpolated to another window; %d dropped (%s); "
        "%d keep their initial values (%s)",
        label,
        len(result.loaded),
        len(resized),
        len(dropped),
        shorten(dropped),
        len(result.kept),
        shorten(result.kept),
    )
    return result
