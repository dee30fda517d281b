"""Evaluation runs: every test set, its numbers, its protocol and some pictures."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, ListConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fiber_d2.evaluation.self_check import self_check
from fiber_d2.evaluation.settings import without_nan

from .durable import write_json
from .errors import RunError
from .inference import is_resumable, run_inference
from .partial import SavedPredictions
from .pictures import SPREAD, PictureEvaluator, make_picture_evaluators, write_overview
from .protocol import (
    describe_evaluation,
    describe_node,
    fingerprint_of,
    log_protocol,
    weights_digest,
)

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
        settings: how the loader words prompts and scales images, as JSON values; only noted down.
    """

    __test__ = False  # not a test class, whatever its name looks like to pytest

    name: str
    loader: Iterable[Batch]
    evaluator: DatasetEvaluator
    tokenizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationOptions:
    """What accompanies an evaluation.

    Attributes:
        pictures: images drawn per test set.
        pictures_of: "spread": the first ones; "best_worst": so many of the best and of the worst.
        self_check: whether the data are checked first, see ``fiber_d2.evaluation.self_check``.
        resume: go on from the predictions that an interrupted evaluation has saved.
    """

    pictures: int = 0
    pictures_of: str = SPREAD
    self_check: bool = True
    resume: bool = False

    @classmethod
    def of(cls, train: Mapping[str, Any]) -> EvaluationOptions:
        """The options in the node ``train`` of a LazyConfig."""
        return cls(
            pictures=train.get("pictures", 0),
            pictures_of=train.get("pictures_of", SPREAD),
            self_check=train.get("self_check", True),
            resume=train.get("resume_eval", False),
        )


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
            TestSet(
                name,
                instantiate(node),
                instantiate(evaluator),
                node.get("tokenizer", ""),
                describe_node(node),
            )
        )
    return test_sets


def check_test_sets(test_sets: Sequence[TestSet]) -> None:
    """Check prompts and ground truth of each test set before anything is computed.

    Raises:
        ValueError: names the data set and what is wrong with it.
    """
    for test_set in test_sets:
        self_check(
            test_set.name,
            test_set.evaluator,
            dataset=getattr(test_set.loader, "dataset", None),
            max_tokens=test_set.settings.get("max_tokens"),
        )


def do_test(
    cfg: DictConfig,
    model: nn.Module,
    *,
    test_sets: Sequence[TestSet] | None = None,
    checkpoint: str = "",
    weights: str = "model",
    storage: EventStorage | None = None,
    resumable: bool = False,
) -> dict[str, dict[str, Any]]:
    """Evaluate ``model`` on every test set of a LazyConfig; see :func:`evaluate_test_sets`.

    Where there is a node ``train.tta``, which lacks only ``model``, what it makes of the model is
    evaluated instead: test-time augmentation.
    """
    notes: dict[str, Any] = {}
    node = cfg.train.get("tta")
    if node:
        notes["test_time_augmentation"] = {"class": str(node["_target_"]), **describe_node(node)}
        node = copy.deepcopy(node)
        node.model = model.module if isinstance(model, DistributedDataParallel) else model
        model = instantiate(node)
    return evaluate_test_sets(
        model,
        build_test_sets(cfg) if test_sets is None else test_sets,
        output_dir=cfg.train.output_dir,
        options=EvaluationOptions.of(cfg.train),
        checkpoint=checkpoint or cfg.train.init_checkpoint,
        weights=weights,
        storage=storage,
        notes=notes,
        resumable=resumable,
    )


def evaluate_test_sets(
    model: nn.Module,
    test_sets: Sequence[TestSet],
    *,
    output_dir: str,
    options: EvaluationOptions | None = None,
    checkpoint: str = "",
    weights: str = "model",
    storage: EventStorage | None = None,
    notes: Mapping[str, Any] | None = None,
    resumable: bool = False,
) -> dict[str, dict[str, Any]]:
    """Evaluate ``model`` on each test set; all processes take part.

    Writes ``<output_dir>/inference/<data set>/results.json``: numbers, and the protocol they were
    obtained by. Pictures go to ``<output_dir>/pictures/<data set>/``, with a contact
    sheet of each set, and one of all sets above them; TensorBoard gets the sheets of the sets.

    Args:
        options: pictures (by default none), and whether to go on from saved predictions. Nothing
            is checked here, see :func:`check_test_sets`.
        checkpoint: where the weights are from; only noted down.
        weights: their kind, such as "model" or "EMA"; only noted down.
        storage: of a running training, gets the contact sheets for TensorBoard.
        notes: further entries of the protocol.
        resumable: save predictions while they are made, so that Ctrl-C (or a crash) loses none
            and a later call with ``options.resume`` goes on. They are deleted at the end.

    Returns:
        Per data set the results of its evaluator; empty in all processes but the main one.

    Raises:
        EvaluationInterrupted: Ctrl-C, where ``resumable``.
        RunError: something broke while images were evaluated.
        ValueError: saved predictions belong to another evaluation.
    """
    if isinstance(model, DistributedDataParallel):
        # Processes have different numbers of batches: nothing may wait for the others in between.
        model = model.module
    options = options or EvaluationOptions()

    def protocol_of(test_set: TestSet, prompts: Any) -> dict[str, Any]:
        return describe_evaluation(
            dataset=test_set.name,
            evaluator=test_set.evaluator,
            model=model,
            loader_settings=test_set.settings,
            prompts=prompts,
            num_images=_num_images(test_set.loader),
            checkpoint=checkpoint,
            weights=weights,
            notes=notes or {},
        )

    saved: dict[str, SavedPredictions] = {}
    if resumable:
        digest = weights_digest(model)
        for test_set in filter(_is_resumable, test_sets):
            # All of them now: what is refused must not be refused after hours.
            protocol = protocol_of(test_set, test_set.loader.dataset[0].get("prompt"))
            saved[test_set.name] = SavedPredictions(
                _folder(output_dir, test_set),
                fingerprint_of(protocol, digest),
                resume=options.resume,
            )
    results: dict[str, dict[str, Any]] = {}
    all_drawn: list[PictureEvaluator] = []
    try:
        for number, test_set in enumerate(test_sets, start=1):
            logger.info("Evaluating %s (%d of %d)", test_set.name, number, len(test_sets))
            drawn = make_picture_evaluators(
                test_set.name,
                test_set.tokenizer,
                output_dir=output_dir,
                limit=options.pictures,
                kind=options.pictures_of,
            )
            all_drawn += drawn
            first = FirstPrompts()
            evaluators = DatasetEvaluators([test_set.evaluator, first, *drawn])
            found = _infer(model, test_set, evaluators, saved.get(test_set.name))
            if comm.is_main_process():
                results[test_set.name] = found
                _write_results(output_dir, test_set, protocol_of(test_set, first.prompts), found)
                _show(drawn, test_set, output_dir, storage)
    finally:
        for predictions in saved.values():
            predictions.close()
    write_overview(output_dir, all_drawn)
    comm.synchronize()
    if comm.is_main_process():
        # Not before: of several test sets those that are done need not be done again.
        for predictions in saved.values():
            predictions.discard()
    return results


def _infer(
    model: nn.Module,
    test_set: TestSet,
    evaluators: DatasetEvaluators,
    saved: SavedPredictions | None,
) -> dict[str, Any]:
    try:
        return dict(run_inference(model, test_set.loader, evaluators, saved=saved))
    except Exception as error:
        raise RunError(
            f"Evaluation of {test_set.name} stopped: {type(error).__name__}: {error}"
        ) from error


def _write_results(
    output_dir: str, test_set: TestSet, protocol: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    log_protocol(protocol)
    path = os.path.join(_folder(output_dir, test_set), "results.json")
    write_json(path, {"protocol": protocol, "results": without_nan(found)})
    logger.info("Results and protocol: %s", path)


def _show(
    drawn: Sequence[PictureEvaluator],
    test_set: TestSet,
    output_dir: str,
    storage: EventStorage | None,
) -> None:
    for pictures in drawn:
        name = f"{test_set.name}/pictures"
        if storage is not None:
            pictures.show(storage, name)
        else:
            pictures.log_to(os.path.join(output_dir, "tensorboard"), name)


class FirstPrompts(DatasetEvaluator):
    """Remembers the prompts of the first image: part of the protocol of a number."""

    def reset(self) -> None:
        self.prompts: Any = None

    def process(self, inputs: Batch, outputs: Sequence[Mapping[str, Any]]) -> None:
        if self.prompts is None:
            self.prompts = inputs[0].get("prompt")


def _is_resumable(test_set: TestSet) -> bool:
    return is_resumable(test_set.loader) and bool(_num_images(test_set.loader))


def _folder(output_dir: str, test_set: TestSet) -> str:
    return os.path.join(output_dir, "inference", test_set.name)


def _num_images(loader: Iterable[Batch]) -> int | None:
    """Of all processes together, None where the loader does not tell."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None
