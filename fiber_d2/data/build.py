"""Loaders: names of data sets in, batches of model inputs out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MapDataset, MetadataCatalog
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.samplers import InferenceSampler
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedTokenizerFast

from fiber_d2.text import load_tokenizer
from fiber_d2.text.prompts import Templates

from .builtin import DETECTION, GROUNDING, REFEXP
from .captions import DetectionPrompter, SampledDetectionPrompter
from .fewshot import few_shot_subset
from .mapper import Augmentations, FiberDatasetMapper, GroundingPrompter, Prompter
from .records import (
    Record,
    check_dataset,
    filter_records,
    ground_truth_kind,
    lean_dataset,
    load_records,
    select_records,
    wider_than_high,
)
from .resampling import image_classes, repeat_factors
from .samplers import TrainingBatchSampler, TrainingStream, Weights
from .training_set import TrainingPart, TrainingSet

logger = logging.getLogger(__name__)


def build_train_loader(
    *,
    datasets: Sequence[str],
    tokenizer: str,
    augmentations: Augmentations,
    total_batch_size: int,
    num_workers: int = 2,
    weights: Weights | None = None,
    repeats: Sequence[int] | None = None,
    repeat_threshold: float | None = None,
    few_shot: int = 0,
    few_shot_seed: int | None = None,
    seed: int = 0,
    start_index: int = 0,
    accumulate: int = 1,
    timeout: float = 900,
    max_tokens: int = 256,
    separator: str = ". ",
    shuffle_classes: bool = False,
    sampled_classes: Mapping[str, Any] | None = None,
    dataset_prompts: bool = True,
    filter_empty: bool = True,
    swap_left_right: bool = True,
    on_empty: str = "error",
    on_overflow: str = "error",
    aspect_ratio_grouping: bool = False,
    max_failed_share: float = 0.01,
    image_format: str = "BGR",
) -> DataLoader:
    """An endless loader of training batches over one data set or a mixture.

    All processes draw from one global stream that is a function of ``seed``: neither the number
    of processes nor that of workers changes which images, in which augmentation, make up a step,
    and ``start_index`` enters the stream at a later step.

    Args:
        datasets: names in the catalogue.
        tokenizer: as of :func:`~fiber_d2.text.load_tokenizer`.
        augmentations: Detectron2 augmentations.
        total_batch_size: images of a batch over all processes.
        num_workers: loading processes of each training process.
        weights: share of draws of each data set, or several such lists by the step from which on
            they hold (``{0: [1, 1], 500: [1, 3]}``); None draws all images equally often.
        repeats: how many times each data set is shown in a pass; by default once.
        repeat_threshold: of LVIS's repeat factors, which show images of rare classes more often
            (see :func:`~fiber_d2.data.resampling.repeat_factors`); for detection data.
        few_shot: where positive, train on so many images per class only, see
            :func:`~fiber_d2.data.fewshot.few_shot_subset`.
        few_shot_seed: of that choice; None takes them in the order of image ids.
        seed: of order and augmentations, not negative.
        start_index: number of steps already done.
        accumulate: batches that a step of the optimiser takes; ``start_index`` and the keys of
            ``weights`` count such steps.
        timeout: seconds to wait for a batch of the loading processes before training stops.
        max_tokens: limit of a caption's tokens, special tokens included.
        separator: stands between the classes of a detection caption.
        shuffle_classes: draw a new order of the classes for each detection image.
        sampled_classes: where given, a detection caption asks for the classes of the image and
            for a draw of others. Keyword arguments of
            :class:`~fiber_d2.data.captions.SampledDetectionPrompter`, ``{}`` for its defaults.
        dataset_prompts: ask in the words that a data set brings along (``prompts`` in its
            metadata), where it does.
        filter_empty: leave out images without a box larger than a pixel that is no crowd.
        swap_left_right: exchange the words left and right in captions of mirrored images.
        on_empty: ``"error"`` where the spans of a phrase meet no token, or ``"keep"`` such a box
            without words.
        on_overflow: ``"error"`` where a sentence is too long, or ``"truncate"``.
        aspect_ratio_grouping: make batches of wide or of tall images only.
        max_failed_share: of the images, how many may be unreadable before training stops; see
            :class:`~fiber_d2.data.training_set.TrainingSet`.
        image_format: channel order.

    Returns:
        Loader of ``list[dict]``, see :class:`~fiber_d2.data.mapper.FiberDatasetMapper`.

    Raises:
        KeyError: a name is not registered.
        FileNotFoundError: an annotation file or images are missing.
        ValueError: a data set has no usable image, or prompts that cannot be made.
    """
    if isinstance(datasets, str):
        datasets = [datasets]
    if not datasets:
        raise ValueError("There is no training data set: name at least one in `datasets`.")
    loaded_tokenizer = load_tokenizer(tokenizer)
    parts: list[TrainingPart] = []
    groups: list[np.ndarray] = []
    factors: list[np.ndarray | None] = []
    for name in datasets:
        records = load_records(name)
        if filter_empty:
            records = filter_records(records, name)
        if few_shot:
            records = select_records(
                records, few_shot_subset(records, few_shot, seed=few_shot_seed)
            )
        prompter = build_prompter(
            name,
            records,
            loaded_tokenizer,
            max_tokens=max_tokens,
            separator=separator,
            shuffle=shuffle_classes,
            sampled=sampled_classes,
            dataset_prompts=dataset_prompts,
            on_empty=on_empty,
            on_overflow=on_overflow,
        )
        mapper = FiberDatasetMapper(
            is_train=True,
            prompter=prompter,
            augmentations=augmentations,
            image_format=image_format,
            swap_left_right=swap_left_right,
        )
        check_dataset(records, mapper, name)
        logger.info("Training data set %s: %d images", name, len(records))
        if aspect_ratio_grouping:
            groups.append(wider_than_high(records))
        resampled = repeat_threshold is not None and isinstance(prompter, DetectionPrompter)
        factors.append(
            repeat_factors(image_classes(records), repeat_threshold) if resampled else None
        )
        parts.append(TrainingPart(name, lean_dataset(records), mapper))
    if isinstance(weights, Mapping):
        images = total_batch_size * accumulate
        weights = {step * images: shares for step, shares in weights.items()}
    stream = TrainingStream(
        [len(part.records) for part in parts],
        weights=weights,
        repeats=repeats,
        repeat_factors=None if repeat_threshold is None else factors,
        seed=seed,
    )
    sampler = TrainingBatchSampler(
        stream,
        total_batch_size=total_batch_size,
        start_index=start_index * accumulate,
        groups=np.concatenate(groups) if groups else None,
    )
    dataset = ConcatDataset([MapDataset(part.records, part.mapper) for part in parts])
    return DataLoader(
        TrainingSet(dataset, seed=seed, max_failed_share=max_failed_share, parts=parts),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        timeout=timeout if num_workers else 0,
        worker_init_fn=worker_init_reset_seed,
        generator=torch.Generator().manual_seed(seed),
    )


def build_test_loader(
    *,
    dataset: str,
    tokenizer: str,
    augmentations: Augmentations,
    batch_size: int = 1,
    num_workers: int = 2,
    max_tokens: int = 256,
    max_classes: int | None = None,
    separator: str = ". ",
    templates: Templates | None = None,
    dataset_prompts: bool = True,
    mirrored_prompt: bool = False,
    image_format: str = "BGR",
) -> DataLoader:
    """A loader that shows each image of a data set once, each process its share.

    Images without boxes are kept. Detectron2's own function serves single images only in some of
    its versions; this one does the same for batches.

    Args:
        dataset: name in the catalogue.
        tokenizer: as of :func:`~fiber_d2.text.load_tokenizer`.
        augmentations: Detectron2 augmentations.
        batch_size: images per batch of each process.
        num_workers: loading processes of each process.
        max_tokens: limit of a caption's tokens, special tokens included.
        max_classes: limit of the classes of one detection caption.
        separator, templates: as of :func:`~fiber_d2.text.build_detection_prompts`.
        dataset_prompts: without templates, take those that the data set brings along, if any.
        mirrored_prompt: see :class:`~fiber_d2.data.mapper.FiberDatasetMapper`.
        image_format: channel order.

    Returns:
        Loader of ``list[dict]``; ``prompt`` is a list where one caption cannot hold all classes.

    Raises:
        KeyError, FileNotFoundError, ValueError: as of :func:`build_train_loader`.
    """
    records = load_records(dataset)
    prompter = build_prompter(
        dataset,
        records,
        load_tokenizer(tokenizer),
        max_tokens=max_tokens,
        max_classes=max_classes,
        separator=separator,
        templates=templates,
        dataset_prompts=dataset_prompts,
    )
    mapper = FiberDatasetMapper(
        is_train=False,
        prompter=prompter,
        augmentations=augmentations,
        image_format=image_format,
        mirrored_prompt=mirrored_prompt,
    )
    check_dataset(records, mapper, dataset)
    return DataLoader(
        MapDataset(lean_dataset(records), mapper),
        batch_size=batch_size,
        sampler=InferenceSampler(len(records)),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
    )


def build_prompter(
    name: str,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_tokens: int = 256,
    max_classes: int | None = None,
    separator: str = ". ",
    templates: Templates | None = None,
    shuffle: bool = False,
    sampled: Mapping[str, Any] | None = None,
    dataset_prompts: bool = True,
    on_empty: str = "error",
    on_overflow: str = "error",
) -> Prompter:
    """The prompter that fits a data set: by its metadata ``ground_truth``, else by its records.

    Args are those of the loaders; ``sampled`` is their ``sampled_classes``.

    Raises:
        ValueError: the kind is unknown, classes are not named, or a class has no token.
    """
    metadata = MetadataCatalog.get(name)
    kind = ground_truth_kind(name, records)
    if kind in (GROUNDING, REFEXP):
        return GroundingPrompter(
            tokenizer,
            max_tokens=max_tokens,
            whole_caption=kind == REFEXP,
            on_empty=on_empty,
            on_overflow=on_overflow,
        )
    if kind != DETECTION:
        raise ValueError(
            f"The data set {name!r} has the metadata ground_truth={kind!r}, which is none of "
            f"{DETECTION}, {GROUNDING}, {REFEXP}."
        )
    if not metadata.get("thing_classes"):
        raise ValueError(
            f"The data set {name!r} does not name its classes: set thing_classes in its metadata."
        )
    if templates is None and dataset_prompts:
        templates = metadata.get("prompts")
    options: dict[str, Any] = {
        "separator": separator,
        "max_tokens": max_tokens,
        "max_classes": max_classes,
        "templates": templates,
    }
    try:
        if sampled is not None:
            options.update(sampled)
            return SampledDetectionPrompter(tokenizer, metadata.thing_classes, **options)
        return DetectionPrompter(tokenizer, metadata.thing_classes, shuffle=shuffle, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Data set {name!r}: {error}") from error
