"""The table of a few-shot protocol: a line for each number of shots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from fiber_d2.evaluation.settings import without_nan

METRICS = ("bbox/AP", "bbox/AP50", "bbox/AP75")
_SHOWN = (("AP", "bbox/AP"), ("AP50", "bbox/AP50"))


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the standard deviation of the sample (``n - 1``); NaN where there is none."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def make_rows(
    zero_shot: Mapping[str, Any] | None,
    shots: Sequence[int],
    results: Mapping[tuple[int, int], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of the table: without training first, then by shots.

    Args:
        zero_shot: metrics of the checkpoint that trainings start from.
        shots: images per class, 0 for all images, in the order of the rows.
        results: of finished trainings by shots and seed: ``test`` (metrics), ``val``, ``images``,
            ``iterations`` and ``seconds``. What is no number is None.

    Returns:
        Rows with ``shots``, ``seeds``, ``images`` (one number per seed), ``val`` and for each
        metric ``values``, ``mean`` and ``std``.
    """
    rows = []
    if zero_shot is not None:
        rows.append(_row("zero-shot", {None: {"test": zero_shot}}))
    for number in shots:
        of_number = {seed: found for (k, seed), found in results.items() if k == number}
        if of_number:
            rows.append(_row("all" if number == 0 else number, of_number))
    return rows


def _row(shots: Any, results: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    cells = list(results.values())
    row: dict[str, Any] = {"shots": shots, "seeds": [seed for seed in results if seed is not None]}
    for key in ("images", "selection", "iterations", "best_iteration", "val", "seconds"):
        if all(key in cell for cell in cells):
            row[key] = [cell[key] for cell in cells]
    row["test"] = {}
    for metric in METRICS:
        values = [cell["test"].get(metric) for cell in cells]
        mean, std = mean_and_std([value for value in values if value is not None])
        row["test"][metric] = {"values": values, "mean": mean, "std": std}
    return without_nan(row)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a markdown table; numbers in percent, with one decimal."""
    body = []
    for row in rows:
        cells = [_words(row["shots"]), _span(row.get("images")), str(len(row["seeds"]) or "-")]
        for _, metric in _SHOWN:
            found = row["test"][metric]
            cells.append(_number(found["mean"], found["std"]))
        values = [_number(value) for value in row["test"][_SHOWN[0][1]]["values"]]
        pairs = [f"{seed}: {value}" for seed, value in zip(row["seeds"], values)]
        on_val = [value for value in row.get("val", ()) if value is not None]
        cells += [_number(*mean_and_std(on_val)), ", ".join(pairs)]
        body.append(cells)
    headers = ["shots", "images", "seeds", *(name for name, _ in _SHOWN), "AP on val", "AP by seed"]
    return tabulate(body, headers=headers, tablefmt="github", disable_numparse=True)


def _words(shots: Any) -> str:
    return {"zero-shot": "zero-shot", "all": "all images"}.get(shots, str(shots))


def _span(images: Sequence[int] | None) -> str:
    if not images:
        return "0"
    low, high = min(images), max(images)
    return str(low) if low == high else f"{low}-{high}"


def _number(mean: float | None, std: float | None = None) -> str:
    if mean is None or math.isnan(mean):
        return "-"
    spread = "" if std is None or math.isnan(std) else f" ± {std:.1f}"
    return f"{mean:.1f}{spread}"
