"""Image and text in, boxes with words out, for scripts, notebooks and programs around the model."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Union

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from omegaconf import DictConfig
from torch import nn

from fiber_d2.data.images import ImageLike, read_pixels
from fiber_d2.data.mapper import prepare_image
from fiber_d2.engine.checkpointer import FiberCheckpointer
from fiber_d2.engine.overrides import load_config
from fiber_d2.heatmaps import TokenHeatmaps, query_for_words, token_heatmaps
from fiber_d2.layers.precision import dtype_of
from fiber_d2.predictions import Prediction
from fiber_d2.predictor_settings import find_config, settings_of, shipped_configs
from fiber_d2.queries import QUERIES, Caption, Classes, Expression, Query, as_query
from fiber_d2.structures import Prompt
from fiber_d2.text import load_tokenizer

__all__ = [
    "Caption",
    "Classes",
    "Expression",
    "Prediction",
    "Predictor",
    "TokenHeatmaps",
    "find_config",
    "shipped_configs",
]

Text = Union[str, Iterable[str], Query]
# Different questions whose tokens are remembered.
_REMEMBERED = 256


class Predictor:
    """A model with its weights, tokenizer and image pipeline, as an evaluation would use them.

    Calls change nothing but a cache of tokenised texts, so that several threads may call one
    predictor at the same time. Test-time augmentation of a configuration is left out.

    Args:
        cfg_or_path: a configuration (LazyConfig node or CfgNode), the path of its file (``.py``,
            ``.yaml``), or the name of one that comes with this package, such as ``"quickstart"``
            or ``"eval/coco_zeroshot"`` (see :func:`shipped_configs`). Of a LazyConfig the first
            test set of ``dataloader.test`` says how images are resized and texts are worded.
        weights: checkpoint file, ours or the original FIBER's; by default the one that the
            configuration names (``train.init_checkpoint``, ``MODEL.WEIGHTS``).
        device: such as "cpu", "cuda", "cuda:1"; by default a GPU where there is one.
        threshold: lowest score of what is returned, for calls that do not say it; None returns
            what an evaluation would.
        batch_size: images that pass the model together.
        precision: "bfloat16" or "float16" for mixed precision, "float32"; by default as the
            configuration says.
        overrides: ``key=value`` changes of a configuration that is given by its path or name.

    Raises:
        FileNotFoundError: no such configuration, checkpoint or tokenizer.
        KeyError, ValueError: a configuration that cannot be used, no weights, or weights of
            another model.

    Examples:
        >>> predictor = Predictor("quickstart", "output/quickstart/model_final.pth")
        ...                                                             # doctest: +SKIP
        >>> found = predictor("shapes.png", ["red circle", "blue cross"], threshold=0.4)
        ...                                                             # doctest: +SKIP
        >>> found["instances"].pred_boxes, found["words"]               # doctest: +SKIP
    """

    def __init__(
        self,
        cfg_or_path: DictConfig | CfgNode | str | os.PathLike[str],
        weights: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        threshold: float | None = None,
        batch_size: int = 8,
        precision: str | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but at least one image is needed.")
        cfg: Any = cfg_or_path
        if isinstance(cfg_or_path, (str, os.PathLike)):
            cfg = load_config(find_config(cfg_or_path), overrides)
        elif overrides:
            raise ValueError("Overrides are for configurations given by a path or a name.")
        if precision not in (None, "float32"):
            dtype_of(precision)
        settings = settings_of(cfg)
        path = os.fspath(weights) if weights is not None else settings.weights
        if not path:
            raise ValueError(
                "There are no weights: name a checkpoint (the configuration names none)."
            )
        self.device = _choose_device(device)
        self._set_up(
            settings.tokenizer,
            settings.prompts,
            settings.image_format,
            settings.augmentations,
            threshold,
            batch_size,
        )
        self.model = settings.build().eval()
        checkpointer = FiberCheckpointer(self.model, weights=settings.kind_of_weights)
        checkpointer.load(path, checkpointables=[])
        self.model.requires_grad_(False).to(self.device)
        if precision is not None:
            self.model.inference_precision = None if precision == "float32" else precision

    def _set_up(
        self,
        tokenizer: str,
        prompts: dict[str, Any],
        image_format: str,
        augmentations: Sequence[T.Augmentation],
        threshold: float | None,
        batch_size: int,
    ) -> None:
        """Everything but the model."""
        self.tokenizer = load_tokenizer(tokenizer)
        self.threshold = _check_share("threshold", threshold)
        self.batch_size = batch_size
        self.image_format = image_format
        self.augmentations = T.AugmentationList(augmentations)
        self._lock = threading.Lock()
        self._known = functools.lru_cache(maxsize=_REMEMBERED)(
            lambda query: query.prompts(self.tokenizer, prompts)
        )

    def __call__(
        self,
        image: ImageLike | Sequence[ImageLike],
        text_or_classes: Text | Sequence[Query],
        *,
        threshold: float | None = None,
        nms_thresh: float | None = None,
        max_detections: int | None = None,
        image_format: str = "BGR",
    ) -> Prediction | list[Prediction]:
        """Look for something in an image, or in each of a list of images.

        Args:
            image: path; PIL image; uint8 array ``(H, W, 3)`` or ``(H, W)``; uint8 tensor
                ``(3, H, W)``; or a list of these.
            text_or_classes: a list of class names; a caption, whose noun phrases are found by
                rules (:func:`fiber_d2.queries.find_noun_phrases`); :class:`Classes` with words
                around the names; :class:`Caption` with spans; :class:`Expression`. For a list of
                images also a list of so many of these three, one for each image.
            threshold: lowest score; by default the predictor's.
            nms_thresh: overlap above which the weaker of two boxes of a target is left out; by
                default the model's.
            max_detections: of an image at most; by default the model's.
            image_format: channel order of arrays and tensors, ``"BGR"`` as of OpenCV and
                Detectron2 or ``"RGB"``. Files and PIL images know theirs.

        Returns:
            A dict with ``instances`` (boxes in pixels of the given image) and ``words`` (a text
            for each box), see :class:`~fiber_d2.predictions.Prediction`; of a list a list.

        Raises:
            FileNotFoundError: no such image.
            ValueError: an image, text or threshold that cannot be used.
        """
        is_list = isinstance(image, (list, tuple))
        images = list(image) if is_list else [image]
        queries = self._queries(text_or_classes, len(images) if is_list else None)
        threshold = self.threshold if threshold is None else _check_share("threshold", threshold)
        model = self._with_limits(threshold, _check_share("nms_thresh", nms_thresh), max_detections)
        found: list[Prediction] = []
        for start in range(0, len(images), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            inputs = [
                {**self._input(one, image_format), "prompt": self._prompts(query)}
                for one, query in zip(images[chunk], queries[chunk])
            ]
            for output, query in zip(model.inference(inputs), queries[chunk]):
                instances = output["instances"].to("cpu")
                if threshold is not None:
                    instances = instances[instances.scores >= threshold]
                found.append(Prediction(instances, query.words))
        return found if is_list else found[0]

    def token_heatmaps(
        self,
        image: ImageLike,
        query: Text,
        words: Sequence[str] | None = None,
        *,
        image_format: str = "BGR",
    ) -> TokenHeatmaps:
        """Where in an image the model sees which word, however unsure it is.

        Args:
            image: one image, as of a call.
            query: one question, as of a call.
            words: some of the classes; of a caption or expression any words of it, whose first
                occurrence is meant. By default all that is asked for.
            image_format: channel order of arrays and tensors.

        Returns:
            Probabilities of K words on every level of the pyramid, ``(K, H_l, W_l)``, and by
            ``upsampled()`` at every pixel; see :class:`~fiber_d2.heatmaps.TokenHeatmaps`. The
            squared score of a box is that of its place times the centerness there.

        Raises:
            FileNotFoundError: no such image.
            ValueError: an image or question that cannot be used, or a word that is not in it.
        """
        question, targets = query_for_words(as_query(query), words)
        item = {**self._input(image, image_format), "prompt": self._prompts(question)}
        return token_heatmaps(self.model, item, targets)

    def _queries(self, given: Any, count: int | None) -> list[Query]:
        if isinstance(given, (list, tuple)) and any(isinstance(one, QUERIES) for one in given):
            if count is None or len(given) != count:
                images = "one image" if count is None else f"{count} images"
                raise ValueError(
                    f"{len(given)} questions are asked about {images}: give one question for each "
                    "image of a list, or a single one for all."
                )
            return [as_query(one) for one in given]
        return [as_query(given)] * (1 if count is None else count)

    def _prompts(self, query: Query) -> list[Prompt]:
        # Tokenizers of Hugging Face change themselves while they work.
        with self._lock:
            return self._known(query)

    def _input(self, image: ImageLike, image_format: str) -> dict[str, Any]:
        pixels = read_pixels(image, self.image_format, given_format=image_format)
        tensor, _ = prepare_image(pixels, self.augmentations)
        return {"image": tensor, "height": pixels.shape[0], "width": pixels.shape[1]}

    def _with_limits(
        self, threshold: float | None, nms_thresh: float | None, max_detections: int | None
    ) -> nn.Module:
        """The model with other limits; weights are shared, and this one does not change."""
        own = self.model.head.postprocessor
        limits = changed_limits(own.score_thresh, threshold, nms_thresh, max_detections)
        if not limits:
            return self.model
        postprocessor = copy.copy(own)
        vars(postprocessor).update(limits)
        head = _shallow(self.model.head, postprocessor=postprocessor)
        return _shallow(self.model, head=head)


def changed_limits(
    score_thresh: float,
    threshold: float | None,
    nms_thresh: float | None,
    max_detections: int | None,
) -> dict[str, Any]:
    """What a call changes of the post-processor's limits, whose ``score_thresh`` is given.

    Raises:
        ValueError: no detection is allowed.
    """
    limits: dict[str, Any] = {}
    if threshold is not None and threshold**2 < score_thresh:
        # A score is the root of class score times centerness: no candidate may be cut before.
        limits["score_thresh"] = threshold**2
    if nms_thresh is not None:
        limits["nms_thresh"] = nms_thresh
    if max_detections is not None:
        if max_detections < 1:
            raise ValueError(f"max_detections is {max_detections}, but has to be positive.")
        limits.update(max_detections=max_detections, max_merged_detections=max_detections)
    return limits


def _shallow(module: nn.Module, **children: nn.Module) -> nn.Module:
    """The same module, parameters and all, with other children."""
    view = copy.copy(module)
    # copy.copy shares the dict of children with the original.
    view._modules = {**module._modules, **children}
    return view


def _choose_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"The device {device!r} is not known to torch.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"The device {device!r} is asked for, but torch sees no GPU here.")
    return chosen


def _check_share(name: str, value: float | None) -> float | None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, but lies between 0 and 1.")
    return value
