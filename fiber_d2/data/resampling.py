"""How often to show each image, so that rare classes are not drowned by frequent ones.

Two ways: a factor per image for :class:`~fiber_d2.data.samplers.TrainingStream`, or a line list,
that is indices with repeats, for :meth:`~fiber_d2.data.tsv.TSVRecords.subset` or a TSV data set.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class ImageClasses(NamedTuple):
    """Which classes each image shows, as flat arrays.

    Attributes:
        images, classes: int64 (M,), one entry per image and different class in it, by image.
        num_images: images, those without any class included.
    """

    images: np.ndarray
    classes: np.ndarray
    num_images: int


def image_classes(records: Iterable[Mapping[str, Any]]) -> ImageClasses:
    """The classes of each record's annotations, crowds included. Reads every record once."""
    counts, classes = array("q"), array("q")
    for record in records:
        found = sorted({entry["category_id"] for entry in record.get("annotations", ())})
        counts.append(len(found))
        classes.extend(found)
    images = np.repeat(np.arange(len(counts)), np.array(counts, dtype=np.int64))
    return ImageClasses(images, np.array(classes, dtype=np.int64), len(counts))


def repeat_factors(shown: ImageClasses, threshold: float) -> np.ndarray:
    """LVIS's repeat factors (arXiv:1908.03195, appendix B.2), as Detectron2 computes them.

    A class in a share ``f`` of the images has the factor ``max(1, sqrt(threshold / f))``, an image
    the largest one of its classes, or 1. Detectron2's function wants a list of all records, twice.

    Args:
        shown: from :func:`image_classes`.
        threshold: share of images below which a class is shown more often; LVIS uses 0.001.

    Returns:
        float64 (N,), at least 1.

    Raises:
        ValueError: the threshold is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"The threshold of repeat factors must be positive, not {threshold}.")
    factors = np.ones(shown.num_images)
    if len(shown.classes):
        share = np.bincount(shown.classes) / shown.num_images
        with np.errstate(divide="ignore"):  # classes that are nowhere
            of_class = np.sqrt(threshold / share)
        np.maximum.at(factors, shown.images, of_class[shown.classes])
    return factors


def class_aware_lines(shown: ImageClasses, per_class: int, *, seed: int = 0) -> np.ndarray:
    """A line list in which every class that has an image is seen in about ``per_class`` lines.

    From the rarest class to the most frequent one: what is missing to ``per_class`` is filled up
    with the class's images, those first that are in the list least often, at random among equals.
    A class is seen more often only where it comes along with rarer ones. Images without a class,
    and some of those that show frequent classes only, are not in the list.

    Args:
        shown: from :func:`image_classes`.
        per_class: lines wanted for each class.
        seed: of the choice and the order.

    Returns:
        int64 (L,) image numbers with repeats, shuffled.

    Raises:
        ValueError: ``per_class`` is not positive, or no image shows a class.
    """
    if per_class < 1:
        raise ValueError(f"The lines per class must be at least 1, not {per_class}.")
    if len(shown.classes) == 0:
        raise ValueError("No image shows a class: there is nothing to make a line list of.")
    generator = np.random.default_rng(seed)
    times = np.zeros(shown.num_images, dtype=np.int64)
    by_class = shown.images[np.argsort(shown.classes, kind="stable")]
    sizes = np.bincount(shown.classes)
    ends = np.cumsum(sizes)
    for index in np.argsort(sizes, kind="stable").tolist():
        own = by_class[ends[index] - sizes[index] : ends[index]]
        missing = per_class - int(times[own].sum())
        if len(own) == 0 or missing <= 0:
            continue
        every, some = divmod(missing, len(own))
        own = generator.permutation(own)
        own = own[np.argsort(times[own], kind="stable")]
        times[own] += every
        times[own[:some]] += 1
    return generator.permutation(np.repeat(np.arange(shown.num_images), times))


def line_list_factors(lines: np.ndarray, num_images: int) -> np.ndarray:
    """How often each image is in a line list, as factors float64 (N,).

    Raises:
        ValueError: a line is no image.
    """
    lines = np.asarray(lines, dtype=np.int64)
    if len(lines) and not 0 <= lines.min() <= lines.max() < num_images:
        raise ValueError(f"The line list has entries beyond the {num_images} images.")
    return np.bincount(lines, minlength=num_images).astype(np.float64)
