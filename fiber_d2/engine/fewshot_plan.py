"""What a few-shot protocol consists of: its data sets, the choice of images, and each training."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, ListConfig

from fiber_d2.data.catalog import DETECTION
from fiber_d2.data.fewshot import few_shot_subset
from fiber_d2.data.records import (
    check_registered,
    filter_records,
    ground_truth_kind,
    load_records,
)

from .scaling import checkpoint_period, images_per_step, iterations

PREPARED, SEEDED, FIRST = "prepared", "seeded", "first"
AUTO = "auto"
SELECTIONS = (AUTO, PREPARED, SEEDED, FIRST)
ALL_IMAGES = 0
# By its path in the results of a data set.
DEFAULT_METRIC = "bbox/AP"
# Shots up to which each image is shown so many times in an epoch (the original's 1_200_8,
# 3_200_4, 5_200_2 and 10_200_1, in its order shots, epochs, copies).
_COPIES = ((1, 8), (3, 4), (5, 2))


@dataclass(frozen=True)
class Splits:
    """Names of the data sets to train on, to choose the best checkpoint by, and to test on."""

    train: str
    val: str
    test: str

    @property
    def tests_on_val(self) -> bool:
        """Whether there is no split that the choice of the checkpoint has not seen."""
        return self.test == self.val


def find_splits(name: str) -> Splits:
    """The splits ``NAME_train``, ``NAME_val`` and, where it exists, ``NAME_test``.

    For a set of ODinW its key (``Aquarium``) is enough, and the smaller validation split
    (``minival``) is taken where the set has one.

    Raises:
        KeyError: no such data sets are registered; names those that are.
    """
    known = set(DatasetCatalog.list())
    bases = [base for base in (name, f"odinw_{name}") if f"{base}_train" in known]
    for base in bases:
        kinds = ("minival", "val") if base.startswith("odinw_") else ("val",)
        vals = [f"{base}_{split}" for split in kinds if f"{base}_{split}" in known]
        if vals:
            test = f"{base}_test"
            return Splits(f"{base}_train", vals[0], test if test in known else vals[0])
    candidates = sorted(
        split[: -len("_train")]
        for split in known
        if split.endswith("_train") and f"{split[: -len('_train')]}_val" in known
    )
    close = difflib.get_close_matches(name, candidates, n=3)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise KeyError(
        f"There are no data sets {name}_train and {name}_val. {hint}Known: "
        f"{', '.join(candidates)}. For your own COCO json files give --train-json, --val-json and "
        "--image-root, or register the data sets in a module and give it with --import."
    )


def default_copies(shots: int) -> int:
    """How often an epoch shows each image: 8 times at 1 shot, 4 at 3, 2 at 5, once above."""
    if shots == ALL_IMAGES:
        return 1
    return next((copies for limit, copies in _COPIES if shots <= limit), 1)


@dataclass(frozen=True)
class Training:
    """One cell of the protocol.

    Attributes:
        shots: images per class, 0 for all images.
        seed: of the choice of images and of the training.
        selection: "prepared", "seeded" or "first"; of all images "".
        num_images: chosen.
        overrides: what turns the recipe into this training.
    """

    shots: int
    seed: int
    selection: str
    num_images: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        shots = "all_images" if self.shots == ALL_IMAGES else f"{self.shots}shot"
        return f"{shots}_seed{self.seed}"

    @property
    def title(self) -> str:
        """For people."""
        shots = "all images" if self.shots == ALL_IMAGES else f"{self.shots}-shot"
        return f"{shots}, seed {self.seed}"


def plan_trainings(
    cfg: DictConfig,
    splits: Splits,
    *,
    shots: Sequence[int],
    seeds: Sequence[int],
    epochs: float = 200,
    copies: int | None = None,
    selection: str = AUTO,
    allow_fewer: bool = False,
    metric: str = DEFAULT_METRIC,
) -> list[Training]:
    """All trainings, shots by shots.

    Args:
        cfg: the recipe, for its batch size and its test loader.
        epochs: at most so many.
        copies: how often an epoch shows each image; None follows :func:`default_copies`.
        selection: "prepared": published choices, data sets named ``TRAIN_shotK_seedS``; "seeded":
            the rule of :func:`~fiber_d2.data.fewshot.few_shot_subset` on shuffled images; "first":
            the same in the order of their ids, whatever the seed, as the original had it; "auto":
            prepared ones where they are on disk, else seeded.
        allow_fewer: put up with classes of fewer images than shots.
        metric: that chooses the best checkpoint, a path in the results of the validation split.

    Raises:
        FileNotFoundError: data or published choices are missing.
        KeyError: a data set is not registered.
        ValueError: numbers that make no protocol, or classes with fewer images than shots.
    """
    _check_numbers(shots, seeds, epochs, copies)
    for name in {splits.train, splits.val, splits.test}:
        check_registered(name)
    records = load_records(splits.train)
    if ground_truth_kind(splits.train, records) != DETECTION:
        raise ValueError(
            f"The data set {splits.train!r} is not one of detection: there are no classes to "
            "choose images by."
        )
    if cfg.dataloader.train.get("filter_empty", True):
        records = filter_records(records, splits.train)
    found = []
    for number in shots:
        for seed in seeds:
            found.append(
                _plan(
                    cfg,
                    splits,
                    records,
                    shots=number,
                    seed=seed,
                    epochs=epochs,
                    copies=default_copies(number) if copies is None else copies,
                    selection=selection,
                    allow_fewer=allow_fewer,
                    metric=metric,
                )
            )
    return found


def _check_numbers(
    shots: Sequence[int], seeds: Sequence[int], epochs: float, copies: int | None
) -> None:
    for option, numbers in (("--shots", shots), ("--seeds", seeds)):
        if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"{option} {' '.join(map(str, numbers))}: give different numbers, none below 0."
            )
    if epochs <= 0 or (copies is not None and copies < 1):
        raise ValueError(f"--epochs {epochs:g} and --copies {copies} have to be positive.")


def _plan(
    cfg: DictConfig,
    splits: Splits,
    records: Sequence[Mapping[str, Any]],
    *,
    shots: int,
    seed: int,
    epochs: float,
    copies: int,
    selection: str,
    allow_fewer: bool,
    metric: str,
) -> Training:
    dataset, kind = splits.train, ""
    few_shot: tuple[int, int | None] = (0, None)
    num_images = len(records)
    if shots != ALL_IMAGES:
        prepared = f"{splits.train}_shot{shots}_seed{seed}"
        kind = _kind_of_selection(selection, prepared)
        if kind == PREPARED:
            dataset, num_images = prepared, len(filter_records(load_records(prepared), prepared))
        else:
            if not allow_fewer:
                _check_classes(records, splits.train, shots)
            few_shot = (shots, seed if kind == SEEDED else None)
            num_images = len(few_shot_subset(records, shots, seed=few_shot[1]))
    shown, size = num_images * copies, images_per_step(cfg)
    max_iter = iterations(epochs=epochs, num_images=shown, batch_size=size)
    eval_period = iterations(epochs=1, num_images=shown, batch_size=size)
    overrides = [
        f"dataloader.train.datasets=[{quoted(dataset)}]",
        f"dataloader.train.few_shot={few_shot[0]}",
        f"dataloader.train.few_shot_seed={'null' if few_shot[1] is None else few_shot[1]}",
        f"dataloader.train.repeats=[{copies}]",
        "dataloader.train.weights=null",
        f"{key_of_test_loader(cfg)}.dataset={quoted(splits.val)}",
        f"train.seed={seed}",
        f"train.max_iter={max_iter}",
        f"train.eval_period={eval_period}",
        f"train.checkpointer.period={checkpoint_period(max_iter, eval_period)}",
        "train.checkpointer.max_to_keep=1",
        "train.epochs=null",
        "train.eval_epochs=null",
        f"train.best={{metric:{quoted(f'{splits.val}/{metric}')},mode:max}}",
        f"train.test_best=[{quoted(splits.test)}]",
    ]
    return Training(shots, seed, kind, num_images, tuple(overrides))


def _kind_of_selection(selection: str, prepared: str) -> str:
    if selection not in (AUTO, PREPARED):
        return selection
    json_file = None
    if prepared in DatasetCatalog.list():
        json_file = MetadataCatalog.get(prepared).get("json_file")
        if json_file is None or PathManager.isfile(json_file):
            return PREPARED
    if selection == AUTO:
        return SEEDED
    raise FileNotFoundError(
        f"The published choice of images {json_file} does not exist; --selection seeded draws one."
        if json_file
        else f"There is no published choice of images, a data set named {prepared}; --selection "
        "seeded draws one."
    )


def _check_classes(records: Sequence[Mapping[str, Any]], name: str, shots: int) -> None:
    counts: Counter[int] = Counter()
    for record in records:
        counts.update({annotation["category_id"] for annotation in record["annotations"]})
    classes = MetadataCatalog.get(name).get("thing_classes") or [str(key) for key in counts]
    few = [
        f"{label} {counts[index]}" for index, label in enumerate(classes) if counts[index] < shots
    ]
    if few:
        raise ValueError(
            f"The data set {name!r} has fewer than {shots} images of {len(few)} of its "
            f"{len(classes)} classes: {', '.join(few[:10])}{', ...' if len(few) > 10 else ''}. "
            "Lower --shots, or add --allow-fewer to take those that there are."
        )


def key_of_test_loader(cfg: DictConfig) -> str:
    """The key of the recipe's one test loader.

    Raises:
        ValueError: there is none, or several.
    """
    nodes = cfg.dataloader.get("test")
    if isinstance(nodes, ListConfig):
        if len(nodes) == 1:
            return "dataloader.test.0"
    elif nodes:
        return "dataloader.test"
    raise ValueError(
        "The few-shot protocol needs a recipe with one test loader, dataloader.test, which it "
        f"points at each split; this one has {len(nodes or ())}."
    )


def quoted(value: str) -> str:
    """A string as a value of an override, whatever is in it."""
    # A backslash means itself but where a quotation mark follows.
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f"'{escaped}'"


def datasets_module(name: str, files: Mapping[str, tuple[str, str]]) -> str:
    """Python that registers one's own COCO json files as splits of the data set ``name``.

    Args:
        files: split to its json file and image folder.

    Returns:
        The text of a module for ``--import``.
    """
    lines = [
        f'"""The data set {name}, as given to fiber_d2.engine.fewshot."""',
        "",
        "from fiber_d2.data import register_coco_json",
        "",
    ]
    for split, (json_file, image_root) in files.items():
        paths = (os.path.abspath(json_file), os.path.abspath(image_root))
        lines.append(f"register_coco_json({f'{name}_{split}'!r}, {paths[0]!r}, {paths[1]!r})")
    return "\n".join(lines) + "\n"
