"""Exported models, run and asked."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from fiber_d2.modeling import PostProcessor
from fiber_d2.modeling.fiber import pad_stack
from fiber_d2.predictor import Predictor, changed_limits
from fiber_d2.structures import Prompt

from .description import build_resize, read_description
from .detections import detections
from .onnx_files import require
from .programs import load_program

Arrays = dict[str, np.ndarray]


class ExportedModel:
    """The files of an exported model; numpy arrays in and out.

    Args:
        folder: that :func:`~fiber_d2.export.export` wrote.
        threads: of onnxruntime, by default as many as there are cores. Programs of torch.export
            take those of torch.
        providers: of onnxruntime.

    Attributes:
        known: the content of ``export.json``.
        limits: of the post-processing.

    Raises:
        FileNotFoundError, ValueError: the folder holds no exported model, or a library is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self.known = read_description(folder)
        self.limits: dict[str, Any] = dict(self.known["limits"])
        self._graphs: dict[str, Any] = {}
        for name, graph in self.known["graphs"].items():
            path = Path(folder) / graph["file"]
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: export the model again.")
            if self.known["format"] == "torch":
                self._graphs[name] = load_program(path)
            else:
                self._graphs[name] = _session(path, threads, providers)

    def image_prefix(self, image: np.ndarray) -> Arrays:
        """What of an image does not depend on text.

        Args:
            image: float32 ``(B, 3, H, W)``, see :mod:`fiber_d2.export.parts`.

        Returns:
            For :meth:`detect`; of a model that was exported as a whole the image itself.

        Raises:
            ValueError: sides that are no multiples of 32.
        """
        height, width = image.shape[-2:]
        unit = self.known["multiple_of"]
        if height % unit or width % unit or not height * width:
            raise ValueError(
                f"Image of {height}x{width} pixels: both sides must be multiples of {unit}; pad "
                f"it with pixel_mean = {self.known['pixel_mean']} (ExportedModel.pad)."
            )
        arrays = {"image": image}
        return arrays if "model" in self._graphs else self._run("image_prefix", arrays)

    def detect(
        self,
        prefix: Mapping[str, np.ndarray],
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        positive_map: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``boxes``, ``class_scores`` and ``centerness``, see :mod:`fiber_d2.export.parts`.

        Args:
            prefix: of :meth:`image_prefix`; of one image for all captions, or of one for each.
            input_ids: int64 ``(P, T)``.
            attention_mask: bool ``(P, T)``.
            positive_map: float32 ``(P, K, T)``.

        Returns:
            float32 ``(P, A, 4)``, ``(P, A, K)`` and ``(P, A)``.

        Raises:
            ValueError: a caption that is too long for the text tower, or numbers of images and
                captions that do not go together.
        """
        pairs, tokens = input_ids.shape
        if tokens > self.known["max_tokens"]:
            raise ValueError(
                f"A caption has {tokens} tokens, but the text tower holds "
                f"{self.known['max_tokens']}: shorten it or split it into several."
            )
        images = len(next(iter(prefix.values())))
        if images not in (1, pairs):
            raise ValueError(
                f"There are {pairs} captions for {images} images: give one image for all of them, "
                "or one for each."
            )
        arrays = {
            name: np.repeat(x, pairs, axis=0) if len(x) == 1 else x for name, x in prefix.items()
        }
        arrays["attention_mask"], arrays["positive_map"] = attention_mask, positive_map
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "model" in self._graphs:
            found = self._run("model", {**arrays, **text})
        else:
            found = self._run("fused", {**arrays, **self._run("text_prefix", text)})
        return found["boxes"], found["class_scores"], found["centerness"]

    def pad(self, image: np.ndarray) -> np.ndarray:
        """``(3, H, W)`` to float32 ``(1, 3, H', W')``, as :meth:`image_prefix` takes it."""
        unit = self.known["multiple_of"]
        height, width = image.shape[1:]
        shape = (1, 3, -(-height // unit) * unit, -(-width // unit) * unit)
        padded = np.empty(shape, dtype=np.float32)
        padded[:] = np.array(self.known["pixel_mean"], dtype=np.float32)[:, None, None]
        padded[0, :, :height, :width] = image
        return padded

    def inference(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """As :meth:`fiber_d2.modeling.FIBER.inference`."""
        return [{"instances": self._detect_image(item)} for item in batched_inputs]

    def _detect_image(self, item: Mapping[str, Any]) -> Instances:
        image, given = item["image"], item["prompt"]
        prompts = [given] if isinstance(given, Prompt) else list(given)
        padded = self.pad(image.numpy())
        prefix = self.image_prefix(padded)
        size = tuple(image.shape[1:])
        results = []
        for prompt in prompts:
            arrays = self.detect(
                prefix,
                *(
                    pad_stack([x]).numpy()
                    for x in (prompt.input_ids, prompt.attention_mask, prompt.positive_map)
                ),
            )
            boxes, scores, rows = detections(
                *(x[0] for x in arrays),
                padded_size=padded.shape[2:],
                image_size=size,
                strides=self.known["strides"],
                **{k: v for k, v in self.limits.items() if k != "max_merged_detections"},
            )
            results.append(
                Instances(
                    size,
                    pred_boxes=Boxes(torch.from_numpy(boxes)),
                    scores=torch.from_numpy(scores),
                    pred_classes=prompt.target_ids[torch.from_numpy(rows)],
                )
            )
        merged = PostProcessor(**self.limits).merge(results)
        height, width = size
        return detector_postprocess(merged, item.get("height", height), item.get("width", width))

    def _run(self, name: str, arrays: Arrays) -> Arrays:
        graph, names = self._graphs[name], self.known["graphs"][name]
        if self.known["format"] == "onnx":
            found = graph.run(names["outputs"], {key: arrays[key] for key in names["inputs"]})
        else:
            with torch.no_grad():
                found = graph(*(torch.from_numpy(arrays[key]) for key in names["inputs"]))
            found = [found] if isinstance(found, torch.Tensor) else found
            found = [x.numpy() for x in found]
        return dict(zip(names["outputs"], found))


class ExportedPredictor(Predictor):
    """Asks an exported model, as a :class:`~fiber_d2.predictor.Predictor` asks a checkpoint.

    Args:
        folder, threads, providers: as of :class:`ExportedModel`.
        threshold: as of the predictor.

    Raises:
        FileNotFoundError, ValueError: as of :class:`ExportedModel`, or no such tokenizer.

    Examples:
        >>> predictor = ExportedPredictor("output/onnx")                # doctest: +SKIP
        >>> predictor("shapes.png", ["red circle", "blue cross"])       # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threshold: float | None = None,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        model: Any = ExportedModel(folder, threads=threads, providers=providers)
        known = model.known
        self.device = torch.device("cpu")
        self._set_up(
            known["tokenizer"],
            known["prompts"],
            known["image_format"],
            build_resize(known["resize"]),
            threshold,
            1,
        )
        self.model = model

    def token_heatmaps(self, *_: Any, **__: Any) -> NoReturn:
        """Exported models return scores of whole targets.

        Raises:
            ValueError: always.
        """
        raise ValueError("Exported models give no heat maps: use a Predictor.")

    def _with_limits(
        self, threshold: float | None, nms_thresh: float | None, max_detections: int | None
    ) -> Any:
        changed = changed_limits(
            self.model.limits["score_thresh"], threshold, nms_thresh, max_detections
        )
        model = copy.copy(self.model)
        model.limits = {**model.limits, **changed}
        return model


def _session(path: Path, threads: int | None, providers: Sequence[str]) -> Any:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return runtime.InferenceSession(os.fspath(path), options, providers=list(providers))
