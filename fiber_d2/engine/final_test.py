"""The best checkpoint of a training, evaluated on test data once."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig
from torch import nn

from fiber_d2.evaluation.settings import without_nan

from .best import BestCheckpoint
from .checkpointer import FiberCheckpointer
from .durable import write_json

logger = logging.getLogger(__name__)

# Below the output folder, so that nothing of the last evaluation is overwritten.
FOLDER = "best"


def config_of_final_test(cfg: DictConfig) -> DictConfig:
    """A LazyConfig that evaluates ``train.test_best`` as ``dataloader.test`` says, into ``best/``.

    Args:
        cfg: its first test loader is the pattern.

    Raises:
        ValueError: it has no test loader.
    """
    names = list(cfg.train.get("test_best") or [])
    cfg = copy.deepcopy(cfg)
    nodes = cfg.dataloader.get("test")
    pattern = nodes[0] if isinstance(nodes, ListConfig) and nodes else nodes
    if names and not pattern:
        raise ValueError("train.test_best needs a loader in dataloader.test as its pattern.")
    found = []
    for name in names:
        node = copy.deepcopy(pattern)
        node.dataset = name
        found.append(node)
    cfg.dataloader.test = found
    cfg.train.output_dir = os.path.join(cfg.train.output_dir, FOLDER)
    return cfg


def run_final_test(
    best: BestCheckpoint,
    model: nn.Module,
    names: Sequence[str],
    evaluate: Callable[[str], Mapping[str, Mapping[str, Any]]],
    final_checkpoint: str,
    weights: str = "model",
) -> None:
    """Load the best checkpoint, evaluate it, and note the numbers in ``best.json``.

    What is noted already is not evaluated again, unless the last evaluation has been noted anew
    (when a yaml configuration's training is resumed at its end). All processes take part.

    Args:
        best: of the training that has ended.
        model: bare; its weights are replaced.
        names: of the data sets.
        evaluate: of the path of the checkpoint whose weights ``model`` has, results per data set.
        final_checkpoint: is tested where no evaluation was good for anything.
        weights: which of the checkpoint's, "model" or "ema".
    """
    if not names or _is_done(best, names):
        return
    path = best.path if best.saved else final_checkpoint
    if not best.saved:
        logger.warning(
            "%s has never been a number: %s is tested instead of the best checkpoint",
            best.history.metric,
            path,
        )
    checkpointer = FiberCheckpointer(model, save_to_disk=False, weights=weights)
    checkpointer.load(path, checkpointables=[])
    results = evaluate(path)
    if comm.is_main_process():
        numbers = {name: flatten_results_dict(dict(results[name])) for name in names}
        content = {**best.summary(), "tested": os.path.basename(path), "test": without_nan(numbers)}
        write_json(best.json_path, content)
        logger.info("The best checkpoint is tested, results are in %s", best.json_path)
    comm.synchronize()


def _is_done(best: BestCheckpoint, names: Sequence[str]) -> bool:
    content: dict[str, Any] = {}
    if comm.is_main_process() and os.path.exists(best.json_path):
        with open(best.json_path) as file:
            content = json.load(file)
    summary = best.summary()
    done = set(names) <= set(content.get("test", ())) and content["best"] == summary["best"]
    done = comm.all_gather(done)[0]
    if done:
        logger.info("The best checkpoint has been tested before: %s", best.json_path)
    return done
