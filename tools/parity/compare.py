"""Which difference is allowed where, and the table of what was found.

The bounds are those of the fixtures' description (its last section, which gives the reasons).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .fixture import Fixture

FEATURES, HEAD, PREDICTIONS, LOSSES = 2e-5, 5e-4, 1e-3, 5e-5
BOX_PIXELS, SCORE = 0.2, 1e-4
GRADIENT_MEDIAN, GRADIENT_TAIL, GRADIENT_TOTAL, GRADIENT_SCALAR = 2e-3, 2e-2, 2e-3, 0.1
GRADIENT_SLICE = 1e-2
# Gradients that are zero but for rounding, relative to the largest one.
GRADIENT_FLOOR = 1e-5
TAIL_SHARE = 0.99
_SCALAR = re.compile(r".*(alpha_\w+|AttnConv\.1\.bias|\.scale)")


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        array: name in the file.
        max_abs, max_rel: largest difference, absolute and over the largest stored value; of
            gradient norms the latter is the median over parameters.
        tolerance: the bound, in words.
        ok: within it.
        note: what else there is to say.
    """

    array: str
    max_abs: float
    max_rel: float
    tolerance: str
    ok: bool
    note: str = ""


class Bound(NamedTuple):
    """Allowed difference: ``absolute + relative * (largest stored value)``."""

    relative: float = 0.0
    absolute: float = 0.0
    # The stored array may be every n-th entry of these axes.
    slices: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.relative:g} of max"] if self.relative else []
        parts += [f"{self.absolute:g} abs"] if self.absolute else []
        return " + ".join(parts) or "exact"


def _channels(*steps: int) -> tuple[tuple[int, ...], ...]:
    return tuple((1, step) for step in steps)


# Patterns of the part after the case's name, and the bound.
_BOUNDS: tuple[tuple[str, Bound], ...] = (
    (r"padded_hw|anchors|anchors_per_level|anchor_visibility|param_requires_grad", Bound()),
    (r"image_stats|image_corner", Bound(relative=1e-6)),
    (r"c\d_slice", Bound(relative=FEATURES, slices=_channels(8, 64))),
    (r"p\d_slice", Bound(relative=FEATURES, slices=_channels(16, 64, 4, 1))),
    (r"text_(hidden|embedded)", Bound(relative=FEATURES, slices=((1,), (1, 8, 8)))),
    (r"text_aggregate", Bound(relative=FEATURES)),
    (r"(dyhead|offset)_absmean", Bound(relative=HEAD)),
    (r"(dyhead|dyblock0)_out_p\d", Bound(relative=HEAD, slices=_channels(1, 16))),
    (r"dyconv_unit/out\d", Bound(relative=HEAD, slices=_channels(1, 4))),
    (r"(bbox_reg|centerness)_p\d", Bound(absolute=PREDICTIONS)),
    (r"dot_product_logits_p\d", Bound(absolute=PREDICTIONS, slices=((1,), (1, 5, 8)))),
    (r"assigned_gt", Bound()),
    (r"pos_(reg|centerness)_targets", Bound(absolute=1e-4)),
    (r"\w+_grad_dy2_\w+", Bound(relative=GRADIENT_SLICE)),
)


def bound_of(name: str) -> Bound | None:
    """The bound of an array compared entry by entry."""
    short = name if name.startswith("dyconv_unit/") else name.split("/", 1)[-1]
    return next((bound for pattern, bound in _BOUNDS if re.fullmatch(pattern, short)), None)


def thin(array: np.ndarray, shape: tuple[int, ...], bound: Bound) -> np.ndarray | None:
    """The documented every-n-th part of ``array`` that has ``shape``; None if there is none."""
    for steps in bound.slices or ((1,),):
        part = array[tuple(slice(None, None, step) for step in steps)]
        if part.shape == shape:
            return part
    return None


def compare(fixture: Fixture, found: Mapping[str, np.ndarray]) -> list[Row]:
    """A row for every array of the file that has to agree, in the file's order."""
    rows, done = [], set()
    for name in fixture.compared():
        if name in done:
            continue
        match = re.fullmatch(r"(.+/det_.+/img\d+)/(boxes|scores|labels)", name)
        if match:
            names = [f"{match[1]}/{part}" for part in ("boxes", "scores", "labels")]
            done.update(names)
            rows.append(_compare_detections(match[1], names, fixture.arrays, found))
        elif name == "param_names":
            # Checked when the model is built: every name must be one of ours.
            rows.append(Row(name, 0.0, 0.0, "exact", True))
        elif name not in found:
            rows.append(Row(name, np.nan, np.nan, "-", False, "no check covers this array"))
        else:
            rows.append(_compare_array(name, fixture, found[name]))
    return rows


def _compare_array(name: str, fixture: Fixture, found: np.ndarray) -> Row:
    stored = fixture.arrays[name]
    if name.endswith("_grad_norm"):
        return _compare_gradients(name, stored, found, fixture.get("param_names"))
    if name.endswith("_losses"):
        return _compare_losses(name, stored, found)
    bound = bound_of(name)
    if bound is not None:
        part = thin(found, stored.shape, bound)
        if part is None:
            return _wrong_shape(name, stored, found)
        difference, scale = _difference(stored, part)
        limit = bound.absolute + bound.relative * scale
        return _row(name, difference, scale, str(bound), difference <= limit)
    base = bound_of(name.removesuffix("_stats")) or bound_of(name.removesuffix("_stats") + "_slice")
    if not name.endswith("_stats") or base is None:
        return Row(name, np.nan, np.nan, "-", False, "no tolerance is known for this array")
    return _compare_stats(name, stored, found, base)


def _difference(stored: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference and largest stored size; a NaN counts as infinitely far."""
    if stored.size == 0:
        return 0.0, 0.0
    a, b = stored.astype(np.float64), found.astype(np.float64)
    difference = float(np.abs(a - b).max())
    return (np.inf if np.isnan(difference) else difference), float(np.abs(a).max())


def _row(name: str, difference: float, scale: float, bound: str, ok: bool, note: str = "") -> Row:
    relative = difference / scale if scale else (0.0 if difference == 0 else np.inf)
    return Row(name, difference, relative, bound, bool(ok), note)


def _wrong_shape(name: str, stored: np.ndarray, found: np.ndarray) -> Row:
    note = f"stored {stored.shape}, computed {found.shape}"
    return Row(name, np.nan, np.nan, "shape", False, note)


def _compare_stats(name: str, stored: np.ndarray, found: np.ndarray, base: Bound) -> Row:
    """Mean, deviation and maximum like single entries; the sum in proportion to itself."""
    if stored.shape != found.shape:
        return _wrong_shape(name, stored, found)
    largest, total = stored[3], stored[2]
    limit = base.absolute + base.relative * largest
    relative = limit / largest if largest else 0.0
    near, scale = _difference(stored[[0, 1, 3]], found[[0, 1, 3]])
    sums, _ = _difference(stored[2:3], found[2:3])
    ok = near <= limit and sums <= max(relative * total, limit)
    return _row(name, near, scale, str(base), ok, "" if ok else f"sum differs by {sums:g}")


def _compare_losses(name: str, stored: np.ndarray, found: np.ndarray) -> Row:
    if stored.shape != found.shape:
        return _wrong_shape(name, stored, found)
    difference = np.abs(stored - found)
    relative = float(np.nanmax(np.append(difference / np.maximum(np.abs(stored), 1e-6), 0)))
    ok = bool((difference <= LOSSES * np.abs(stored) + 1e-9).all())
    return Row(name, float(difference.max(initial=0)), relative, f"{LOSSES:g} of each", ok)


def _compare_gradients(name: str, stored: np.ndarray, found: np.ndarray, names: np.ndarray) -> Row:
    """Distribution over parameters: single kinks may move single numbers."""
    if stored.shape != found.shape:
        return _wrong_shape(name, stored, found)
    a, b = np.nan_to_num(stored), np.nan_to_num(found)
    floor = GRADIENT_FLOOR * a.max(initial=0)
    relative = np.abs(a - b) / np.maximum(np.maximum(a, floor), 1e-30)
    # Below the floor on both sides is rounding.
    relative[(a <= floor) & (b <= floor)] = 0
    scalar = np.array([_SCALAR.fullmatch(str(n)) is not None for n in names], dtype=bool)
    active = (a > floor) | (b > floor)
    many, few = relative[active & ~scalar], relative[scalar]
    median = float(np.median(many)) if many.size else 0.0
    tail = float(np.quantile(many, TAIL_SHARE)) if many.size else 0.0
    worst_scalar = float(few.max(initial=0))
    total_a, total_b = np.linalg.norm(a), np.linalg.norm(b)
    total = float(abs(total_a - total_b) / total_a) if total_a else float(total_b > 0)
    ok = (
        median <= GRADIENT_MEDIAN
        and tail <= GRADIENT_TAIL
        and total <= GRADIENT_TOTAL
        and worst_scalar <= GRADIENT_SCALAR
    )
    note = f"99 %: {tail:.1e}, total: {total:.1e}, scalars: {worst_scalar:.1e}"
    bound = f"{GRADIENT_MEDIAN:g} median"
    return Row(name, float(np.abs(a - b).max(initial=0)), median, bound, bool(ok), note)


def _compare_detections(
    prefix: str, names: list[str], stored: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> Row:
    """Pair by label and nearest box; nothing may be left over on either side."""
    bound = f"{BOX_PIXELS:g} px, {SCORE:g} score"
    lacking = [name for name in names if name not in stored or name not in found]
    if lacking:
        return Row(prefix, np.nan, np.nan, bound, False, f"lacks {', '.join(lacking)}")
    boxes, scores, labels = (stored[name].astype(np.float64) for name in names)
    our_boxes, our_scores, our_labels = (found[name].astype(np.float64) for name in names)
    free = np.ones(len(our_boxes), dtype=bool)
    worst_box = worst_score = 0.0
    unmatched = 0
    for box, score, label in zip(boxes, scores, labels):
        candidates = np.flatnonzero(free & (our_labels == label))
        distance = np.abs(our_boxes[candidates] - box).max(axis=1, initial=0)
        if not len(candidates) or distance.min() > BOX_PIXELS:
            unmatched += 1
            continue
        nearest = candidates[distance.argmin()]
        free[nearest] = False
        worst_box = max(worst_box, float(distance.min()))
        worst_score = max(worst_score, float(abs(score - our_scores[nearest])))
    ok = unmatched == 0 and not free.any() and worst_score <= SCORE
    note = f"{len(boxes)} stored, score differs by {worst_score:.1e}"
    if unmatched or free.any():
        note += f"; {unmatched} stored and {int(free.sum())} computed ones unmatched"
    scale = float(np.abs(boxes).max(initial=1))
    return Row(prefix, worst_box, worst_box / scale, bound, bool(ok), note)


def as_text(rows: list[Row]) -> str:
    """The table, for reading."""
    width = max(len(row.array) for row in rows)
    lines = [f"{'array':{width}}  {'max abs':>9}  {'max rel':>9}  {'tolerance':<20}  ok"]
    for row in rows:
        lines.append(
            f"{row.array:{width}}  {row.max_abs:9.2e}  {row.max_rel:9.2e}  {row.tolerance:<20}  "
            f"{'yes' if row.ok else 'NO'}{'  ' + row.note if row.note else ''}"
        )
    return "\n".join(lines)
