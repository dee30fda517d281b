"""Plots of an evaluation: precision over recall, and AP class by class."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fiber_d2.drawing import save_png
from fiber_d2.evaluation.curves import PrecisionCurves
from fiber_d2.files import replacing

# IoU thresholds that get a curve of their own, where there is one, besides the mean.
_SHOWN_IOU = (0.5, 0.75)
_BLUES = ("#9ecae1", "#4292c6", "#08306b")
_PALE = "#dddddd"
_LONGEST_NAME = 32


def plot_precision_recall(curves: PrecisionCurves, *, title: str = "") -> np.ndarray:
    """Precision over recall at IoU 0.5, at 0.75, and as the mean over all thresholds.

    Each curve is the mean over the classes with ground truth, its own mean the AP beside it.

    Returns:
        uint8 RGB picture.

    Raises:
        ValueError: no class has ground truth.
    """
    return _pixels(precision_recall_figure(curves, title=title))


def plot_class_ap(curves: PrecisionCurves, *, title: str = "", limit: int = 40) -> np.ndarray:
    """A bar for each class with ground truth, best first: AP, with AP50 behind it.

    Args:
        limit: of more classes than that, only the best and the worst are drawn, half of it each.

    Returns:
        uint8 RGB picture.

    Raises:
        ValueError: no class has ground truth.
    """
    return _pixels(class_ap_figure(curves, title=title, limit=limit))


def save_plots(
    curves: Mapping[str, PrecisionCurves], folder: str | os.PathLike[str], *, title: str = ""
) -> list[Path]:
    """Draw both plots, and write the numbers of all classes as a table.

    Args:
        curves: by kind, such as ``bbox``.
        folder: gets ``<kind>_precision_recall.png``, ``<kind>_class_ap.png`` and
            ``<kind>_class_ap.csv`` of each kind.
        title: of the plots, such as the name of the data set.

    Returns:
        the paths of the files.

    Raises:
        ValueError: no class has ground truth.
    """
    paths = []
    for kind, of_kind in curves.items():
        heading = " ".join(part for part in (title, kind if len(curves) > 1 else "") if part)
        for name, plot in (
            ("precision_recall", plot_precision_recall),
            ("class_ap", plot_class_ap),
        ):
            paths.append(Path(folder, f"{kind}_{name}.png"))
            save_png(paths[-1], plot(of_kind, title=heading))
        paths.append(Path(folder, f"{kind}_class_ap.csv"))
        with replacing(paths[-1]) as file:
            file.write(_table(of_kind).encode())
    return paths


def precision_recall_figure(curves: PrecisionCurves, *, title: str = "") -> Figure:
    """What :func:`plot_precision_recall` draws, to be changed or saved in another format."""
    _check(curves)
    figure = Figure(figsize=(6, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    own = [iou for iou in _SHOWN_IOU if np.isclose(curves.iou, iou).any()]
    for color, iou in zip(_BLUES, [*own, None]):
        name = f"mean of IoU {curves.iou[0]:.2f} to {curves.iou[-1]:.2f}"
        if iou is not None:
            name = f"IoU {iou:.2f}"
        label = f"{name} (AP {curves.ap(iou):.1f})"
        axes.plot(curves.recall, curves.mean(iou), color=color, linewidth=2, label=label)
    count = int(curves.defined.sum())
    classes = "" if count == 1 else f", mean of {count} classes"
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel=f"precision{classes}")
    axes.grid(color=_PALE)
    # Below the curves; precision falls towards the right.
    axes.legend(loc="lower left", frameon=True)
    _finish(axes, title)
    return figure


def class_ap_figure(curves: PrecisionCurves, *, title: str = "", limit: int = 40) -> Figure:
    """What :func:`plot_class_ap` draws, to be changed or saved in another format."""
    _check(curves)
    values = curves.class_ap()
    order = np.flatnonzero(curves.defined)
    order = order[np.argsort(-values[order], kind="stable")]
    count = len(order)
    if count > limit:
        title = f"{title} (the best {limit // 2} and the worst {limit // 2} of {count})".strip()
        order = np.concatenate([order[: limit // 2], order[-(limit // 2) :]])
    places = np.arange(len(order), dtype=float)
    if count > limit:
        places[limit // 2 :] += 1  # a gap between both
    figure = Figure(figsize=(6, 1.2 + 0.22 * len(order)), dpi=100, layout="constrained")
    axes = figure.subplots()
    if np.isclose(curves.iou, 0.5).any():
        axes.barh(places, curves.class_ap(0.5)[order], color=_BLUES[0], label="AP50")
    axes.barh(places, values[order], color=_BLUES[1], height=0.5, label="AP")
    for place, index in zip(places, order):
        # Beside the bars, where neither they nor the line of the mean are in the way.
        axes.text(101, place, f"{values[index]:.1f}", fontsize=8, verticalalignment="center")
    names = [_short(str(curves.names[index])) for index in order]
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.set(xlim=(0, 100), ylim=(places[-1] + 0.7, -0.7), xlabel="AP in percent")
    axes.axvline(curves.ap(), color=_BLUES[2], linewidth=1, label=f"mean {curves.ap():.1f}")
    axes.grid(axis="x", color=_PALE)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    _finish(axes, title)
    return figure


def _check(curves: PrecisionCurves) -> None:
    if not curves.defined.any():
        raise ValueError("No class has ground truth: there is nothing to plot.")


def _finish(axes: Axes, title: str) -> None:
    # Names with dollars are no formulas.
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def _pixels(figure: Figure) -> np.ndarray:
    """Drawn without pyplot, whose figures and backend belong to the caller."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _table(curves: PrecisionCurves) -> str:
    """CSV of all classes with ground truth, best first."""
    columns = {"AP": curves.class_ap()}
    for iou in _SHOWN_IOU:
        if np.isclose(curves.iou, iou).any():
            columns[f"AP{round(100 * iou)}"] = curves.class_ap(iou)
    rows = np.flatnonzero(curves.defined)
    rows = rows[np.argsort(-columns["AP"][rows], kind="stable")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", *columns])
    for row in rows.tolist():
        writer.writerow([curves.names[row], *(f"{values[row]:.4f}" for values in columns.values())])
    return text.getvalue()
