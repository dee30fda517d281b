"""FIBER (arXiv:2206.07643), fine-grained stage: images and captions in, boxes tied to words out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import ImageList, Instances
from torch import nn

from fiber_d2.layers.precision import dtype_of
from fiber_d2.structures import Prompt

from .fusion import FusionBackbone, ImagePrefix
from .language_head import ATSSLanguageHead
from .text_cache import TextCache

# Pixels of the image-prompt pairs that pass together on a CPU. More of them leave its caches
# between one layer and the next: at 800x1216 pixels two pairs take 5 % longer together than one by
# one, sixteen 30 %; at 224x320 pixels eight together are the fastest.
CPU_PIXELS = 2**19


def pad_stack(tensors: Sequence[torch.Tensor], value: float = 0) -> torch.Tensor:
    """Stack tensors of equal rank, padded at the end of every axis to the largest: ``(B, ...)``."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors))]
    out = tensors[0].new_full((len(tensors), *shape), value)
    for row, tensor in zip(out, tensors):
        row[tuple(slice(size) for size in tensor.shape)].copy_(tensor)
    return out


@META_ARCH_REGISTRY.register()
class FIBER(nn.Module):
    """The meta-architecture.

    Inputs are Detectron2's dicts with ``image`` (uint8 or float ``(3, H, W)``, BGR, 0..255) and
    ``prompt`` (a :class:`~fiber_d2.structures.Prompt`; in evaluation also a list of them, whose
    results are merged). Training needs ``instances`` with ``gt_boxes`` and ``gt_positive_map``
    (bool ``(N, T)`` over the prompt's tokens).

    Args:
        backbone: the two fused towers and the pyramid.
        head: dynamic head and predictions.
        pixel_mean, pixel_std: per channel, BGR, on the scale 0..255.
        prompt_batch_size: image-prompt pairs that pass the fused part together in evaluation;
            bounds the memory of images with many prompts. On CPUs large images take fewer.
        text_cache_mib: memory for what evaluation remembers of captions between images, the part
            of the text tower that precedes the exchange; 0 computes it anew for each image.
        compile_backend: run the towers, the pyramid and the dynamic head through torch.compile,
            "inductor" for its usual compiler; None does not compile. Sizes of images, captions and
            batches may change without compiling again, but for a batch of one, maps of one or two
            windows, and sizes that were equal by chance when they were first seen.
        inference_precision: "bfloat16" or "float16" for evaluation in mixed precision; None leaves
            it to the caller's autocast, and float32 without one. Weights, scores and boxes are
            float32 in any case.

    Attributes:
        text_cache: what is remembered of captions.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: FusionBackbone,
        head: ATSSLanguageHead,
        pixel_mean: Sequence[float] = (103.53, 116.28, 123.675),
        pixel_std: Sequence[float] = (57.375, 57.12, 58.395),
        prompt_batch_size: int = 16,
        text_cache_mib: int = 256,
        compile_backend: str | None = None,
        inference_precision: str | None = None,
    ) -> None:
        super().__init__()
        if inference_precision is not None:
            dtype_of(inference_precision)
        self.inference_precision = inference_precision
        self.backbone = backbone
        self.head = head
        self.prompt_batch_size = prompt_batch_size
        self.text_cache = TextCache(text_cache_mib * 2**20)
        self._in_evaluation_mode: tuple[str, ...] = ()
        if compile_backend is not None:
            backends = torch.compiler.list_backends(())
            if compile_backend not in backends:
                raise ValueError(
                    f"compile_backend is {compile_backend!r}, but torch.compile knows "
                    f"{', '.join(backends)}."
                )
            backbone.compile_backend = head.tower.compile_backend = compile_backend
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "head": build_proposal_generator(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "prompt_batch_size": cfg.MODEL.FIBER.PROMPT_BATCH_SIZE,
            "text_cache_mib": cfg.MODEL.FIBER.TEXT_CACHE_MIB,
            "compile_backend": cfg.MODEL.FIBER.COMPILE_BACKEND or None,
            "inference_precision": cfg.MODEL.FIBER.INFERENCE_PRECISION or None,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def keep_in_evaluation_mode(self, names: Sequence[str]) -> None:
        """Leave these submodules in evaluation mode while the rest trains: no dropout in them.

        Args:
            names: as of ``named_modules``; they replace those given before.
        """
        self._in_evaluation_mode = tuple(names)
        self.train(self.training)

    def train(self, mode: bool = True) -> FIBER:
        """As usual, but for :meth:`keep_in_evaluation_mode`; training forgets captions."""
        super().train(mode)
        if mode:
            self.text_cache.clear()
        for name in self._in_evaluation_mode:
            self.get_submodule(name).eval()
        return self

    def preprocess_images(self, batched_inputs: Sequence[Mapping[str, Any]]) -> ImageList:
        """Normalise, then pad with zeros to the batch maximum, a multiple of 32."""
        images = [
            (item["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
            for item in batched_inputs
        ]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def pad_prompts(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 and mask bool, ``(P, T)``, padded to the longest prompt."""
        limit = self.backbone.text.max_tokens
        for prompt in prompts:
            if prompt.num_tokens > limit:
                raise ValueError(
                    f"The caption {prompt.text[:80]!r}... has {prompt.num_tokens} tokens, but the "
                    f"text tower holds {limit}: shorten it or split it into several prompts."
                )
        pad = self.backbone.text.pad_token_id
        ids = pad_stack([prompt.input_ids for prompt in prompts], pad)
        mask = pad_stack([prompt.attention_mask for prompt in prompts], False)
        return ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)

    def forward(
        self, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor] | list[dict[str, Instances]]:
        """Losses in training; in evaluation one ``{"instances": Instances}`` per input, with
        ``pred_boxes`` in pixels of the original image, ``scores`` and ``pred_classes`` (the
        prompt's ``target_ids``), by descending score."""
        if self.training:
            return self._losses(batched_inputs)
        return self.inference(batched_inputs)

    def _losses(self, batched_inputs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        images = self.preprocess_images(batched_inputs)
        ids, mask = self.pad_prompts([item["prompt"] for item in batched_inputs])
        features = self.backbone(images.tensor, ids, mask)
        outputs = self.head(features.pyramid, features.text, mask)
        instances = [item["instances"] for item in batched_inputs]
        boxes = pad_stack([x.gt_boxes.tensor for x in instances])
        valid = pad_stack([torch.ones(len(x), dtype=torch.bool) for x in instances], False)
        positive_map = pad_stack(
            [x.gt_positive_map for x in instances]
            + [torch.zeros(0, ids.shape[1], dtype=torch.bool)],
            False,
        )[:-1]
        return self.head.losses(
            outputs,
            mask,
            *(x.to(self.device, non_blocking=True) for x in (boxes, valid, positive_map)),
        )

    @torch.no_grad()
    def inference(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """Detections; what depends on the image alone is computed once for all its prompts.

        Numbers of an image do not depend on the batch it is in. Padding is not masked (the
        weights were trained with it), so only images that need the same padded size pass
        together; captions may differ.
        """
        with self.inference_autocast():
            return self._detect_batch(batched_inputs)

    def inference_autocast(self) -> AbstractContextManager[Any]:
        """The context of ``inference_precision``."""
        if self.inference_precision is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype_of(self.inference_precision))

    def _detect_batch(
        self, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Instances]]:
        unit = self.backbone.size_divisibility
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(batched_inputs):
            size = tuple(-(-side // unit) for side in item["image"].shape[-2:])
            groups.setdefault(size, []).append(index)
        detections: list[dict[str, Instances]] = [{} for _ in batched_inputs]
        for members in groups.values():
            results = self._detect_images([batched_inputs[index] for index in members])
            for index, result in zip(members, results):
                detections[index]["instances"] = result
        return detections

    def _detect_images(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[Instances]:
        """Detections of images of one padded size, in pixels of the original images."""
        images = self.preprocess_images(batched_inputs)
        pairs: list[tuple[int, Prompt]] = []
        for index, item in enumerate(batched_inputs):
            given = item["prompt"]
            pairs.extend((index, x) for x in ([given] if isinstance(given, Prompt) else given))
        prefix = self.backbone.image_prefix(images.tensor)
        found: dict[int, Instances] = {}
        # Captions of about the same length pass together: none is padded to a much longer one.
        order = sorted(range(len(pairs)), key=lambda number: pairs[number][1].num_tokens)
        together = self._pairs_at_a_time(images.tensor)
        for start in range(0, len(order), together):
            numbers = order[start : start + together]
            results = self._detect(prefix, [pairs[n] for n in numbers], images.image_sizes)
            found.update(zip(numbers, results))
        collected: list[list[Instances]] = [[] for _ in batched_inputs]
        for number, (index, _) in enumerate(pairs):
            collected[index].append(found[number])
        detections = []
        for item, results in zip(batched_inputs, collected):
            merged = self.head.postprocessor.merge(results)
            height, width = merged.image_size
            detections.append(
                detector_postprocess(merged, item.get("height", height), item.get("width", width))
            )
        return detections

    def _pairs_at_a_time(self, images: torch.Tensor) -> int:
        """How many pairs pass the fused part together; ``images`` (B, 3, H, W)."""
        if images.device.type != "cpu":
            return self.prompt_batch_size
        height, width = images.shape[-2:]
        return min(self.prompt_batch_size, -(-CPU_PIXELS // (height * width)))

    def _detect(
        self,
        prefix: ImagePrefix,
        pairs: Sequence[tuple[int, Prompt]],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Detections of pairs of an image's number and a caption."""
        prompts = [prompt for _, prompt in pairs]
        _, mask = self.pad_prompts(prompts)
        text = pad_stack(
            self.text_cache(
                prompts,
                lambda missing: self.backbone.text_prefix(*self.pad_prompts(missing)),
                self.backbone.text.text_only(),
                self.device,
            )
        )
        images = sorted({image for image, _ in pairs})
        if len(images) < len(prefix.tokens):
            prefix = prefix.select(torch.tensor(images, device=self.device))
        index = [images.index(image) for image, _ in pairs]
        image_index = None
        if index != list(range(len(images))):
            image_index = torch.tensor(index, device=self.device)
        features = self.backbone.exchange(prefix, text, mask, image_index)
        outputs = self.head(features.pyramid, features.text, mask)
        positive_map = pad_stack([prompt.positive_map for prompt in prompts]).to(self.device)
        results = self.head.inference(outputs, positive_map, [image_sizes[i] for i, _ in pairs])
        for prompt, result in zip(prompts, results):
            result.pred_classes = prompt.target_ids.to(self.device)[result.pred_classes]
        return results
