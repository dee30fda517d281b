"""Precision at given recalls, class by class: what the numbers of AP are the means of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PrecisionCurves:
    """Curves of K classes at T IoU thresholds, sampled at R recalls, of objects of all sizes.

    Attributes:
        names: K class names.
        iou: ``(T,)`` thresholds, ascending.
        recall: ``(R,)`` in 0..1, ascending.
        precision: ``(T, R, K)`` in 0..1, the best at that recall or beyond; NaN for classes
            without ground truth.
    """

    names: Sequence[str]
    iou: np.ndarray
    recall: np.ndarray
    precision: np.ndarray

    def mean(self, iou: float | None = None) -> np.ndarray:
        """Precision ``(R,)``, the mean over the classes with ground truth; NaN if there are none.

        Args:
            iou: one of the thresholds; by default the mean over all.

        Raises:
            ValueError: not one of the thresholds.
        """
        chosen = self._at(iou)[..., self.defined]
        if not chosen.size:
            return np.full(len(self.recall), np.nan)
        return chosen.mean(axis=(0, 2))

    def class_ap(self, iou: float | None = None) -> np.ndarray:
        """AP ``(K,)`` in percent, the mean over recalls, and over thresholds but for one given."""
        return 100 * self._at(iou).mean(axis=(0, 1))

    def ap(self, iou: float | None = None) -> float:
        """AP in percent, the mean of those of the classes with ground truth."""
        return 100 * float(self.mean(iou).mean())

    @property
    def defined(self) -> np.ndarray:
        """bool ``(K,)``: which classes have ground truth."""
        return ~np.isnan(self.precision[0, 0])

    def _at(self, iou: float | None) -> np.ndarray:
        if iou is None:
            return self.precision
        chosen = np.isclose(self.iou, iou)
        if not chosen.any():
            thresholds = ", ".join(f"{value:.2f}" for value in self.iou)
            raise ValueError(f"There is no curve at IoU {iou}; there are: {thresholds}.")
        return self.precision[chosen]


def coco_curves(evaluation: Any, names: Sequence[str]) -> PrecisionCurves:
    """The curves of a COCOeval (of pycocotools or faster-coco-eval) that has accumulated.

    Args:
        evaluation: with its largest ``maxDets`` last.
        names: of the classes, in the order of ``evaluation.params.catIds``.
    """
    params = evaluation.params
    area = params.areaRngLbl.index("all")
    precision = np.asarray(evaluation.eval["precision"])[..., area, -1]
    # Scorers mark what is not defined by -1.
    precision = np.where(precision > -1, precision, np.nan)
    return PrecisionCurves(list(names), np.asarray(params.iouThrs), np.asarray(params.recThrs),
                           precision)  # fmt: skip
