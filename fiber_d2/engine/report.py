"""The end of a run: one table of what came out, beside what chance alone would give."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from detectron2.evaluation.testing import flatten_results_dict
from tabulate import tabulate

from .durable import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """What a finished run knows about itself.

    Attributes:
        results: per data set the nested results of its evaluator.
        output_dir: where everything was written.
        checkpoint: the weights the results belong to.
        seed: of the run.
        num_parameters: trainable ones of the model.
        iterations: training steps done in all.
        train_seconds: spent in training steps, those before a restart included.
        total_seconds: since the process started its work, data preparation and evaluation included.
        best: of :meth:`fiber_d2.engine.best.BestCheckpoint.summary`, None where none was kept.
    """

    results: Mapping[str, Mapping[str, Any]]
    output_dir: str
    checkpoint: str
    seed: int
    num_parameters: int
    iterations: int
    train_seconds: float
    total_seconds: float
    best: Mapping[str, Any] | None = None


def final_report(
    *,
    metrics: Mapping[str, Sequence[str]],
    chance: bool = True,
    chance_seed: int = 0,
    next_steps: Sequence[str] = (),
) -> Callable[[RunSummary], dict[str, Any]]:
    """A function that writes ``metrics.json`` of a finished run and logs its final table.

    Args:
        metrics: what to call a number -> (data set, path in its results), for example
            ``"detection/AP50": ("shapes_detection_val", "bbox/AP50")``.
        chance: whether to measure the chance level of each number too.
        chance_seed: of the random answers.
        next_steps: lines of advice below the table.

    Raises:
        ValueError: an entry of ``metrics`` that is no pair.
    """
    for name, source in metrics.items():
        if isinstance(source, str) or len(source) != 2:
            raise ValueError(f"The metric {name!r} needs a pair (data set, key), got {source!r}.")
    return partial(
        write_report,
        metrics={name: tuple(source) for name, source in metrics.items()},
        chance=chance,
        chance_seed=chance_seed,
        next_steps=tuple(next_steps),
    )


def write_report(
    summary: RunSummary,
    *,
    metrics: Mapping[str, tuple[str, str]],
    chance: bool,
    chance_seed: int,
    next_steps: Sequence[str],
) -> dict[str, Any]:
    """See :func:`final_report`. Returns what ``metrics.json`` holds: numbers by flat keys.

    A number that the evaluation did not give is left out, with a warning.
    """
    found = _look_up(summary.results, metrics)
    levels: dict[str, float] = {}
    if chance:
        measured = {name: metrics[name] for name in found}
        levels = _look_up(_chance_levels(measured, chance_seed), measured)
    content: dict[str, Any] = dict(found)
    content.update({f"chance/{name}": value for name, value in levels.items()})
    content.update(
        {
            "time/train_seconds": round(summary.train_seconds, 1),
            "time/total_seconds": round(summary.total_seconds, 1),
            "iterations": summary.iterations,
            "num_parameters": summary.num_parameters,
            "seed": summary.seed,
        }
    )
    if summary.best and summary.best["best"]:
        content.update({f"best/{key}": value for key, value in summary.best["best"].items()})
        content["best/metric"] = summary.best["metric"]
    path = os.path.join(summary.output_dir, "metrics.json")
    write_json(path, content)
    logger.info("Final results\n%s", _table(summary, metrics, found, levels, path, next_steps))
    return content


def _chance_levels(metrics: Mapping[str, tuple[str, str]], seed: int) -> dict[str, Any]:
    # Imported here: evaluators load large libraries that a run without this report can spare.
    from fiber_d2.evaluation.chance import chance_level

    datasets = dict.fromkeys(dataset for dataset, _ in metrics.values())
    return {dataset: chance_level(dataset, seed=seed) for dataset in datasets}


def _look_up(
    results: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, tuple[str, str]]
) -> dict[str, float]:
    found = {}
    for name, (dataset, key) in metrics.items():
        numbers = flatten_results_dict(results.get(dataset, {}))
        if key in numbers:
            found[name] = float(numbers[key])
        else:
            known = ", ".join(numbers) or "none at all"
            logger.warning("%s: no result %s of %s; there are: %s", name, key, dataset, known)
    return found


def _table(
    summary: RunSummary,
    metrics: Mapping[str, tuple[str, str]],
    found: Mapping[str, float],
    levels: Mapping[str, float],
    path: str,
    next_steps: Sequence[str],
) -> str:
    rows = [(name, found.get(name), levels.get(name), metrics[name][0]) for name in metrics]
    headers = ("metric (percent)", "value", "chance", "data set")
    table = tabulate(rows, headers=headers, floatfmt=".1f", missingval="-", tablefmt="simple")
    train_time = timedelta(seconds=round(summary.train_seconds))
    total_time = timedelta(seconds=round(summary.total_seconds))
    facts = [
        ("training", f"{summary.iterations} iterations in {train_time}, all in all {total_time}"),
        ("model", f"{summary.num_parameters / 1e6:.1f} M parameters, seed {summary.seed}"),
        ("checkpoint", summary.checkpoint),
        *_best_facts(summary.best),
        ("metrics", path),
        ("pictures", os.path.join(summary.output_dir, "pictures")),
        ("log", os.path.join(summary.output_dir, "log.txt")),
        ("curves", f"tensorboard --logdir {summary.output_dir}"),
    ]
    lines = [table, "", tabulate(facts, tablefmt="plain")]
    if next_steps:
        lines += ["", "What to try next:", *(f"  - {step}" for step in next_steps)]
    return "\n".join(lines)


def _best_facts(best: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not best or not best["best"]:
        return []
    found = best["best"]
    where = f"{best['checkpoint']}, after iteration {found['iteration']}"
    return [("best", f"{best['metric']} {found['value']:.2f} ({where})")]
