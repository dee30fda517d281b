"""Evaluation runs: every test set, its numbers, its protocol and some pictures."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .checkpointer import write_atomically
from .errors import RunError
from .pictures import make_picture_evaluators, write_overview

logger = logging.getLogger(__name__)

Batch = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TestSet:
    """A data set to evaluate on.

    Attributes:
        name: in the catalogue.
        loader: batches of model inputs; has a length.
        evaluator: of the data set.
        tokenizer: name of the tokenizer of its prompts, for the words in pictures.
    """

    __test__ = False  # not a test class, whatever its name looks like to pytest

    name: str
    loader: Iterable[Batch]
    evaluator: DatasetEvaluator
    tokenizer: str


def build_test_sets(cfg: DictConfig) -> list[TestSet]:
    """The test sets of ``dataloader.test`` (a node or a list), each with its own evaluator.

    Raises:
        ValueError: a node without ``dataset``, or two of the same data set.
    """
    nodes = cfg.dataloader.get("test") or []
    nodes = list(nodes) if isinstance(nodes, ListConfig) else [nodes] if nodes else []
    test_sets: list[TestSet] = []
    for node in nodes:
        name = node.get("dataset")
        if not name:
            raise ValueError("A node of dataloader.test does not name its `dataset`.")
        if name in [known.name for known in test_sets]:
            raise ValueError(f"dataloader.test names the data set {name!r} twice.")
        evaluator = copy.deepcopy(cfg.dataloader.evaluator)
        evaluator.dataset_name = name
        if evaluator.get("output_dir") is None:
            evaluator.output_dir = os.path.join(cfg.train.output_dir, "inference")
        test_sets.append(
            TestSet(name, instantiate(node), instantiate(evaluator), node.get("tokenizer", ""))
        )
    return test_sets


def do_test(
    cfg: DictConfig,
    model: nn.Module,
    *,
    test_sets: Sequence[TestSet] | None = None,
    checkpoint: str = "",
    storage: EventStorage | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate ``model`` on every test set of a LazyConfig; see :func:`evaluate_test_sets`."""
    return evaluate_test_sets(
        model,
        build_test_sets(cfg) if test_sets is None else test_sets,
        output_dir=cfg.train.output_dir,
        pictures=cfg.train.get("pictures", 0),
        checkpoint=checkpoint or cfg.train.init_checkpoint,
        storage=storage,
    )


def evaluate_test_sets(
    model: nn.Module,
    test_sets: Sequence[TestSet],
    *,
    output_dir: str,
    pictures: int = 0,
    checkpoint: str = "",
    storage: EventStorage | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate ``model`` on each test set; all processes take part.

    Writes ``<output_dir>/inference/<data set>/results.json``: numbers, and the protocol they were
    obtained by. Pictures go to ``<output_dir>/pictures/<data set>/``, with a contact
    sheet of each set, and one of all sets above them.

    Args:
        pictures: images drawn per test set.
        checkpoint: where the weights are from; only noted down.
        storage: of a running training, gets the contact sheets for TensorBoard.

    Returns:
        Per data set the results of its evaluator; empty in all processes but the main one.

    Raises:
        RunError: something broke while images were evaluated.
    """
    if isinstance(model, DistributedDataParallel):
        # Processes have different numbers of batches: nothing may wait for the others in between.
        model = model.module
    results: dict[str, dict[str, Any]] = {}
    all_drawn = []
    for number, test_set in enumerate(test_sets, start=1):
        logger.info("Evaluating %s (%d of %d)", test_set.name, number, len(test_sets))
        drawn = make_picture_evaluators(
            test_set.name, test_set.tokenizer, output_dir=output_dir, limit=pictures
        )
        all_drawn.extend(drawn)
        first = FirstCaption()
        try:
            found = inference_on_dataset(
                model, test_set.loader, DatasetEvaluators([test_set.evaluator, first, *drawn])
            )
        except Exception as error:
            raise RunError(
                f"Evaluation of {test_set.name} stopped: {type(error).__name__}: {error}"
            ) from error
        if not comm.is_main_process():
            continue
        results[test_set.name] = dict(found)
        _write_results(test_set, found, first.caption, output_dir, checkpoint)
        if storage is not None:
            for pictured in drawn:
                pictured.show(storage, f"{test_set.name}/pictures")
    write_overview(output_dir, all_drawn)
    return results


class FirstCaption(DatasetEvaluator):
    """Remembers the prompt of the first image: part of the protocol of a number."""

    def reset(self) -> None:
        self.caption = ""

    def process(self, inputs: Batch, outputs: Sequence[Mapping[str, Any]]) -> None:
        if not self.caption:
            prompt = inputs[0]["prompt"]
            prompts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
            self.caption = " | ".join(part.text for part in prompts)


def _write_results(
    test_set: TestSet,
    results: Mapping[str, Any],
    caption: str,
    output_dir: str,
    checkpoint: str,
) -> None:
    evaluator = test_set.evaluator
    content = {
        "protocol": {
            "dataset": test_set.name,
            "evaluator": f"{type(evaluator).__module__}.{type(evaluator).__qualname__}",
            "settings": _plain_settings(evaluator),
            "caption_of_first_image": caption,
            "checkpoint": checkpoint,
        },
        "results": _without_nan(results),
    }
    path = os.path.join(output_dir, "inference", test_set.name, "results.json")
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _plain_settings(evaluator: DatasetEvaluator) -> dict[str, Any]:
    """The numbers, names and switches an evaluator holds: thresholds, top-k, protocol."""
    plain = (bool, int, float, str)
    return {
        name.lstrip("_"): value
        for name, value in vars(evaluator).items()
        if isinstance(value, plain)
        or (isinstance(value, (tuple, list)) and value and all(isinstance(x, plain) for x in value))
    }


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: a category without ground truth has no score."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
