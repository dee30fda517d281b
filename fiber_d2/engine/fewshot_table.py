"""What came out of a few-shot protocol: read from its runs, put into one table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.evaluation.testing import flatten_results_dict
from tabulate import tabulate

from fiber_d2.evaluation.settings import without_nan
from fiber_d2.files import replacing, save_json

from .best import BEST_FILE

METRICS = ("bbox/AP", "bbox/AP50", "bbox/AP75")
_SHOWN = (("AP", "bbox/AP"), ("AP50", "bbox/AP50"))


def read_zero_shot(dataset: str, folder: Path) -> dict[str, Any]:
    """The numbers of an evaluation of ``dataset`` whose output folder is ``folder``."""
    with open(folder / "inference" / dataset / "results.json") as file:
        return {"test": _numbers(json.load(file)["results"])}


def read_training(dataset: str, folder: Path) -> dict[str, Any]:
    """What a finished training has come to, and how its best checkpoint did on ``dataset``."""
    with open(folder / BEST_FILE) as file:
        content = json.load(file)
    best = content["best"] or {"value": None, "iteration": None}
    return {
        "test": _numbers(content["test"][dataset]),
        "val": best["value"],
        "best_iteration": best["iteration"],
        "iterations": content["evaluations"][-1]["iteration"] + 1,
        "stopped_early": content["stopped_early"],
    }


def _numbers(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Flat names to numbers; what is none, such as NaN, is None."""
    return {
        name: float(value) if value is not None and math.isfinite(value) else None
        for name, value in flatten_results_dict(dict(results)).items()
        if value is None or isinstance(value, (int, float))
    }


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
    names = [name for name, _ in _SHOWN]
    headers = ["shots", "images", "seeds", *names, "best on val", "AP by seed"]
    return tabulate(body, headers=headers, tablefmt="github", disable_numparse=True)


def _words(shots: Any) -> str:
    return "all images" if shots == "all" else str(shots)


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


def write_table(
    folder: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, complete: bool
) -> None:
    """Write ``table.md`` and ``table.json``.

    Args:
        about: entries of the json; ``dataset`` is its name and ``splits`` those of its splits.
        complete: whether all trainings are done.
    """
    save_json({**about, "complete": complete, "rows": list(rows)}, folder / "table.json")
    test = about["splits"]["test"]
    notes = [f"Tested on `{test}`, AP in percent, mean ± standard deviation over seeds."]
    if test == about["splits"]["val"]:
        notes.append("Checkpoints were chosen on the same images: the numbers are optimistic.")
    if not complete:
        notes.append("Not all trainings are done.")
    text = f"# Few-shot: {about['dataset']}\n\n{' '.join(notes)}\n\n{markdown_table(rows)}\n"
    with replacing(folder / "table.md") as file:
        file.write(text.encode())
