"""A configuration and a checkpoint to a folder of files for other programs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig

from fiber_d2.engine.overrides import load_config
from fiber_d2.files import save_json
from fiber_d2.predictor import Predictor
from fiber_d2.predictor_settings import find_config, settings_of

from . import onnx_files, programs
from .deform_conv import check_form
from .description import FILE, describe
from .parts import Graphs
from .quantize import quantize_onnx

ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
FORMATS = tuple(ENDINGS)


def export(
    cfg_or_path: DictConfig | CfgNode | str | os.PathLike[str],
    weights: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    format: str = "onnx",
    parts: bool = False,
    deform_conv: str = "operator",
    int8: bool = False,
    opset: int = onnx_files.OPSET,
    overrides: Sequence[str] = (),
) -> Path:
    """Write a model as :class:`~fiber_d2.export.ExportedPredictor` and other programs read it.

    Args:
        cfg_or_path, weights, overrides: as of :class:`~fiber_d2.predictor.Predictor`.
        output: folder; files of the same names are replaced, once all are complete.
        format: ``"onnx"`` or ``"torch"`` (``torch.export``, ``.pt2``).
        parts: write text prefix, image prefix and the rest, instead of the whole: for many captions
            of one image, or many images of one caption.
        deform_conv: ``"operator"`` or ``"grid_sample"``, see :mod:`fiber_d2.export.deform_conv`.
        int8: of ONNX, weights of linear layers in 8 bits, see :mod:`fiber_d2.export.quantize`.
        opset: operator set of ONNX.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, KeyError: as of the predictor.
        ValueError: as of the predictor, arguments that do not go together, a library is missing, or
            the folder cannot be written. All but the first before any work is done.
    """
    _check(format, deform_conv, int8, opset)
    folder = _writable(output)
    cfg: Any = cfg_or_path
    if isinstance(cfg_or_path, (str, os.PathLike)):
        cfg = load_config(find_config(cfg_or_path), overrides)
    elif overrides:
        raise ValueError("Overrides are for configurations given by a path or a name.")
    model = Predictor(cfg, weights, device="cpu").model
    known = describe(model, settings_of(cfg))
    known.update(format=format, deform_conv=deform_conv, graphs={})
    if format == "onnx":
        known.update(int8=int8, opset=opset)
    graphs = Graphs(model, deform_conv=deform_conv)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        for graph in graphs.parts() if parts else graphs.whole():
            program = programs.trace(graph)
            path = Path(draft) / (graph.name + ENDINGS[format])
            if format == "torch":
                programs.save_program(program, path)
            else:
                onnx_files.save_onnx(program, graph, path, opset=opset)
            if int8:
                quantize_onnx(path)
            known["graphs"][graph.name] = {
                "file": path.name,
                "inputs": list(graph.arguments),
                "outputs": list(graph.outputs),
            }
        for path in Path(draft).iterdir():
            os.replace(path, folder / path.name)
    save_json(known, folder / FILE)
    return folder


def _check(format: str, deform_conv: str, int8: bool, opset: int) -> None:
    if format not in FORMATS:
        raise ValueError(f"The format {format!r} is not known: it is one of {', '.join(FORMATS)}.")
    check_form(deform_conv)
    programs.check_torch()
    if format == "torch":
        if int8:
            raise ValueError("int8 is for the format onnx.")
        return
    lowest = onnx_files.LOWEST_OPSET[deform_conv]
    if opset < lowest:
        raise ValueError(f"opset is {opset}, but {deform_conv} needs {lowest} or later.")
    for library in ("onnx", "onnxscript", *(["onnxruntime"] if int8 else [])):
        onnx_files.require(library)


def _writable(output: str | os.PathLike[str]) -> Path:
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"The output folder {folder} cannot be written: {error.strerror or error}."
        ) from error
    return folder
