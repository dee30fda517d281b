"""The original's checkpoints in and out (the model specification, section 8).

Letters: L pyramid levels, C channels of the head.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .files import (
    averaged_weights,
    list_problems,
    read_file,
    resolve_checkpoint_path,
    shorten,
    state_dict_of,
)
from .names import (
    CELL_ANCHORS,
    FIBER_TABLE,
    HEAD,
    OUR_SWIN,
    ROBERTA,
    SWIN,
    NameMap,
    is_fiber_name,
    is_unused,
    strip_prefixes,
)

logger = logging.getLogger(__name__)

StateDict = Mapping[str, torch.Tensor]

_TO_OURS = NameMap(FIBER_TABLE)
_TO_THEIRS = _TO_OURS.inverse
_SCALES = "head.scales"
_OUR_QUERY_NORM = ".attn.text_attention.norm."
_BIAS_TABLE = re.compile(
    re.escape(OUR_SWIN) + r"stages\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table"
)
# The class convolution that the original builds, freezes and never reads.
NUM_UNUSED_CLASSES = 80
UNUSED_CLASS_BIAS = -math.log(99)


def is_fiber_state_dict(state_dict: Mapping[str, object]) -> bool:
    """Whether the names are those of the original's fine-grained stage."""
    return any(is_fiber_name(name) for name in state_dict)


def convert_fiber_state_dict(state_dict: StateDict) -> dict[str, torch.Tensor]:
    """Weights under the original's names to weights under ours.

    Names may carry ``module.`` or ``model.``. Entries that nothing reads (class convolution, text
    pooler, position ids, index buffers, cell anchors) are logged and dropped. Tensors are shared,
    not copied, but for ``head.scales`` (L,), which the original keeps as L tensors of one number.

    Raises:
        ValueError: names that neither side knows, listed with their shapes.
    """
    converted: dict[str, torch.Tensor] = {}
    scales: dict[int, torch.Tensor] = {}
    dropped, unknown = [], []
    for name, tensor in _stripped(state_dict).items():
        ours = _TO_OURS(name)
        if ours is None:
            if is_unused(name):
                dropped.append(name)
            else:
                unknown.append(f"{name} {tuple(tensor.shape)}")
        elif ours.startswith(f"{_SCALES}."):
            scales[int(ours.rsplit(".", 1)[1])] = tensor
        else:
            converted[ours] = tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} entries are none of FIBER's fine-grained stage: {shorten(unknown, 20)}"
            "; is this a checkpoint of another model or stage?"
        )
    if scales:
        if sorted(scales) != list(range(len(scales))):
            raise ValueError(
                f"The scales of levels {sorted(scales)} are there, but they must count from 0 "
                f"without a gap ({HEAD}scales.N.scale)."
            )
        wrong = [f"{i}: {tuple(scale.shape)}" for i, scale in scales.items() if scale.numel() != 1]
        if wrong:
            raise ValueError(f"{HEAD}scales.N.scale must hold one number each, not {wrong}.")
        converted[_SCALES] = torch.cat([scales[i].reshape(1) for i in range(len(scales))])
    if dropped:
        logger.info("Dropped %d entries without a use here: %s", len(dropped), shorten(dropped))
    return converted


def _stripped(state_dict: StateDict) -> dict[str, torch.Tensor]:
    stripped = {strip_prefixes(name): tensor for name, tensor in state_dict.items()}
    if len(stripped) < len(state_dict):
        twice = [name for name in state_dict if name != strip_prefixes(name) in state_dict]
        raise ValueError(f"Entries are there with and without a prefix: {shorten(twice)}.")
    return stripped


def rename_to_fiber(tensors: StateDict) -> dict[str, torch.Tensor]:
    """Tensors named and shaped like our parameters (weights, gradients) to the original's names.

    Raises:
        ValueError: names that are not ours, listed with their shapes.
    """
    renamed: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name == _SCALES:
            for level, scale in enumerate(tensor.unbind()):
                renamed[f"{HEAD}scales.{level}.scale"] = scale.reshape(1).clone()
            continue
        theirs = _TO_THEIRS(name)
        if theirs is None:
            unknown.append(f"{name} {tuple(tensor.shape)}")
        else:
            renamed[theirs] = tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} entries are none of this project's FIBER: {shorten(unknown, 20)}."
        )
    return renamed


def export_fiber_state_dict(
    state_dict: StateDict,
    *,
    carried: StateDict | None = None,
    anchor_strides: Sequence[int] = (8, 16, 32, 64, 128),
    anchor_sizes: Sequence[float] = (64, 128, 256, 512, 1024),
) -> dict[str, torch.Tensor]:
    """Weights under our names to everything the original's ``load_state_dict`` expects.

    Exact in both directions: ``export(convert(x), carried=x)`` is ``x``, tensor by tensor. Entries
    that the original expects and nothing reads are added: index buffers, position ids and cell
    anchors follow from the sizes; the class convolution ``(80, C, 1, 1)``, which is frozen and
    unused there, gets weight 0 and bias -log(99) unless ``carried`` has it.

    Args:
        state_dict: of our model.
        carried: a state dict with the original's names whose unused entries are taken over.
        anchor_strides, anchor_sizes: of the model's anchor grid.

    Raises:
        ValueError: names that are not ours, or numbers of levels that do not agree.
    """
    exported = rename_to_fiber(state_dict)
    constants = _unused_entries(state_dict, anchor_strides, anchor_sizes)
    taken = _stripped(carried or {})
    constants.update({name: tensor for name, tensor in taken.items() if is_unused(name)})
    exported.update(constants)
    return exported


def _unused_entries(
    state_dict: StateDict, strides: Sequence[int], sizes: Sequence[float]
) -> dict[str, torch.Tensor]:
    entries: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        match = _BIAS_TABLE.fullmatch(name)
        if match:
            window = (math.isqrt(tensor.shape[0]) + 1) // 2
            key = f"{SWIN}layers.{match[1]}.blocks.{match[2]}.attn.relative_position_index"
            entries[key] = relative_position_index(window)
    positions = state_dict.get("backbone.text.embeddings.position.weight")
    if positions is not None:
        entries[f"{ROBERTA}embeddings.position_ids"] = torch.arange(positions.shape[0])[None]
    box = state_dict.get("head.bbox_pred.weight")
    if box is not None:
        entries[f"{HEAD}cls_logits.weight"] = box.new_zeros(NUM_UNUSED_CLASSES, *box.shape[1:])
        entries[f"{HEAD}cls_logits.bias"] = box.new_full((NUM_UNUSED_CLASSES,), UNUSED_CLASS_BIAS)
    if _SCALES in state_dict:
        levels = len(state_dict[_SCALES])
        if not levels == len(strides) == len(sizes):
            raise ValueError(
                f"The model has {levels} levels, but {len(strides)} anchor strides and "
                f"{len(sizes)} anchor sizes are given: name those of the model."
            )
        for level, (stride, size) in enumerate(zip(strides, sizes)):
            low, high = (stride - size) / 2, (stride + size) / 2 - 1
            entries[f"{CELL_ANCHORS}{level}"] = torch.tensor([[low, low, high, high]])
    return entries


def relative_position_index(window: int) -> torch.Tensor:
    """Row of the bias table for every pair of tokens of a window: int64 ``(N, N)``."""
    token = torch.arange(window * window)
    y, x = token // window, token % window
    dy = y[:, None] - y[None, :] + window - 1
    dx = x[:, None] - x[None, :] + window - 1
    return dy * (2 * window - 1) + dx


def check_variant(converted: Mapping[str, object], model_names: Mapping[str, object]) -> None:
    """That weights and model are of the same fusion version.

    Raises:
        ValueError: one is v2 and the other v3.
    """

    def is_v3(names: Mapping[str, object]) -> bool:
        return any(_OUR_QUERY_NORM in name for name in names)

    if is_v3(converted) == is_v3(model_names):
        return
    found, built = ("v3", "v2") if is_v3(converted) else ("v2", "v3")
    needed = found == "v3"
    raise ValueError(
        f"The checkpoint is of fusion {found} ({'with' if needed else 'without'} norm_i2t_i), but "
        f"the model is built as {built}: set model.backbone.vision.query_norm={needed} "
        f"(MODEL.FIBER.VISION.QUERY_NORM {needed})."
    )


def check_fit(converted: StateDict, model_state: StateDict, source: str) -> None:
    """That weights are exactly those the model needs.

    Raises:
        ValueError: lists missing, unexpected and differently shaped entries.
    """
    missing = [f"{n} {tuple(t.shape)}" for n, t in model_state.items() if n not in converted]
    unexpected = [f"{n} {tuple(t.shape)}" for n, t in converted.items() if n not in model_state]
    shapes = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(model_state[name].shape)}"
        for name, tensor in converted.items()
        if name in model_state and tensor.shape != model_state[name].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problems = list_problems(found, 20)
    if problems:
        raise ValueError(f"{source} does not fit the model. Entries {problems}.")


def read_fiber_checkpoint(
    path: str | os.PathLike[str], *, use_ema: bool = False
) -> dict[str, torch.Tensor]:
    """The weights in one of the original's files, under the original's names.

    Args:
        path: a ``.pth`` file, a ``last_checkpoint`` file that names one, or a folder with that.
        use_ema: take the averaged weights (``model_ema``) instead of ``model``, which is what the
            original evaluates.

    Raises:
        FileNotFoundError, ValueError: no such file, or not one of these.
    """
    path = resolve_checkpoint_path(path)
    content = read_file(path)
    if use_ema:
        content = {"model": averaged_weights(content, path)}
    weights = state_dict_of(content, path)
    if not is_fiber_state_dict(weights):
        raise ValueError(
            f"The checkpoint {path} is none of the original's fine-grained stage: it holds "
            f"{shorten(list(weights))}."
        )
    return _stripped(weights)


def load_fiber_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, use_ema: bool = False
) -> None:
    """Load one of the original's files into a :class:`~fiber_d2.modeling.FIBER`, all or nothing.

    Optimiser, schedule and iteration in the file are ignored. The file is read without running
    code from it.

    Args:
        model: of the same variant (v2 or v3) and sizes.
        path, use_ema: as of :func:`read_fiber_checkpoint`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, of the other variant, or with entries missing,
            unexpected or of another shape, which the message lists.
    """
    model = getattr(model, "module", model)  # DistributedDataParallel
    weights = read_fiber_checkpoint(path, use_ema=use_ema)
    converted = convert_fiber_state_dict(weights)
    state = model.state_dict()
    check_variant(converted, state)
    check_fit(converted, state, f"The checkpoint {os.fspath(path)}")
    model.load_state_dict(converted)
