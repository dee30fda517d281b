"""ONNX files: written by ``torch.onnx`` from programs of ``torch.export``."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.export import ExportedProgram

from .parts import Graph

OPSET = 20
# The first that have what a form of deformable convolution becomes.
LOWEST_OPSET = {"operator": 19, "grid_sample": 20}
# Files of protobuf end at 2 GiB: weights beyond this many bytes go into a second file.
_ONE_FILE = 1_500_000_000
# Names of the sizes that vary.
_AXES = {
    "image": ("batch", None, "height", "width"),
    "input_ids": ("batch", "tokens"),
    "attention_mask": ("batch", "tokens"),
    "positive_map": ("batch", "targets", "tokens"),
    "image_tokens": ("batch", "token_rows", "token_columns", None),
    "text": ("batch", "tokens", None),
    "boxes": ("batch", "anchors", None),
    "class_scores": ("batch", "anchors", "targets"),
    "centerness": ("batch", "anchors"),
}


def require(name: str) -> ModuleType:
    """A library of the extra ``export``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"ONNX needs the library {error.name}, which is not installed: "
            "pip install 'fiber_d2[export]', or pip install onnx onnxscript onnxruntime."
        ) from error


def save_onnx(program: ExportedProgram, graph: Graph, path: Path, *, opset: int = OPSET) -> None:
    """Write an ``.onnx`` file, and ``.onnx.data`` beside it where weights exceed 1.5 GB.

    Raises:
        ValueError: a library is missing.
    """
    require("onnx")
    require("onnxscript")
    from onnxscript import opset19

    def deform_conv2d(
        x: Any,
        weight: Any,
        offset: Any,
        mask: Any,
        bias: Any,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        groups: int,
        offset_groups: int,
        use_mask: bool,
    ) -> Any:
        return opset19.DeformConv(
            x,
            weight,
            offset,
            bias,
            mask if use_mask else None,
            dilations=[dilation_h, dilation_w],
            group=groups,
            kernel_shape=[3, 3],
            offset_group=offset_groups,
            pads=[pad_h, pad_w, pad_h, pad_w],
            strides=[stride_h, stride_w],
        )

    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=list(graph.arguments),
        output_names=list(graph.outputs),
        opset_version=opset,
        custom_translation_table={torch.ops.torchvision.deform_conv2d.default: deform_conv2d},
        verbose=False,
    )
    _name_sizes(written.model.graph)
    size = sum(weight.nbytes for weight in program.state_dict.values())
    written.save(path, external_data=size > _ONE_FILE)


def _name_sizes(graph: Any) -> None:
    """Words for the sizes of what goes in and out; what is between has none.

    They were formulas of the sizes that come in, which runtimes work out for themselves: as text
    they can take more room than the weights.
    """
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    for value in (*graph.inputs, *graph.outputs):
        number = value.name.removeprefix("image_feature_")
        names = _AXES.get(value.name, ("batch", None, f"rows_{number}", f"columns_{number}"))
        for axis, name in enumerate(names):
            if name is not None:
                value.shape[axis] = name
