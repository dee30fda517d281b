"""Weights of linear layers in 8 bits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .onnx_files import require


def quantize_onnx(path: Path) -> None:
    """Replace an ONNX file by one whose matrix products with weights are in int8.

    Weights have a scale for each output channel; what they are multiplied with is quantised as it
    comes (dynamic quantisation), so no images are needed. Convolutions and embeddings stay float32.

    Raises:
        ValueError: a library is missing.
    """
    onnx = require("onnx")
    require("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path, load_external_data=False).graph
    # Products with a vector have no channels: onnxruntime would write what it cannot run.
    vectors = {weight.name for weight in graph.initializer if len(weight.dims) == 1}
    exclude = [node.name for node in graph.node if vectors.intersection(node.input[1:2])]
    target = path.with_name(f"int8_{path.name}")
    with _without_advice():
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=exclude,
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    os.replace(target, path)
    # What the large weights were in, if they were not in the file itself.
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)


@contextmanager
def _without_advice() -> Iterator[None]:
    """It says of every model, prepared or not, that it should be prepared."""
    root = logging.getLogger()
    root.addFilter(_is_serious)
    try:
        yield
    finally:
        root.removeFilter(_is_serious)


def _is_serious(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING
