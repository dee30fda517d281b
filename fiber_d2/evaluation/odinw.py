"""ODinW: which of its 13 or 35 sets are on disk, loaders for those, and their average."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from tabulate import tabulate

from fiber_d2.data import build_test_loader, register_all_builtin
from fiber_d2.data.catalog import BUILTIN, ODINW13, ODINW35
from fiber_d2.files import save_json

logger = logging.getLogger(__name__)

_SETS = {"13": ODINW13, "35": ODINW35}
SPLITS = ("train", "val", "test")


def find_odinw_sets(
    which: int | str = 13, root: str | None = None, *, split: str = "test"
) -> tuple[list[str], list[str]]:
    """The sets whose annotation file is on disk, and those whose is not.

    Args:
        which: 13, the sets that GLIP and FIBER report, or 35, all.
        root: folder of all data sets; by default where they are registered, which is that of the
            environment variable ``DETECTRON2_DATASETS``, or ``./datasets``.
        split: "train", "val" or "test".

    Returns:
        Names in the catalogue, such as ``odinw_Aquarium_test``: those found, and those missing.
    """
    found: list[str] = []
    missing: list[str] = []
    for name in _names(which, split).values():
        (found if PathManager.isfile(_json_file(name, root)) else missing).append(name)
    return found, missing


def odinw_test_nodes(
    which: int | str = 13, *, split: str = "test", root: str | None = None, **loader_options: Any
) -> list[DictConfig]:
    """The nodes of ``dataloader.test`` for the sets on disk; a warning names those missing.

    Args:
        which, split: as of :func:`find_odinw_sets`.
        root: the same; where given, the built-in data sets are registered anew under it.
        loader_options: arguments of :func:`~fiber_d2.data.build_test_loader` but ``dataset``, the
            same for all sets.

    Returns:
        Lazy calls of ``build_test_loader``, one per set.

    Raises:
        FileNotFoundError: there is none of the sets.
    """
    found, missing = find_odinw_sets(which, root, split=split)
    if not found:
        raise FileNotFoundError(
            f"None of the {len(missing)} sets of ODinW-{which} is on disk: {', '.join(missing)}. "
            f"The first of them should be at {_json_file(missing[0], root)}; datasets/README.md "
            "shows where they belong, and DETECTRON2_DATASETS names the folder of all data sets."
        )
    if missing:
        logger.warning(
            "%d of the %d sets of ODinW-%s are not on disk and left out: %s",
            len(missing),
            len(found) + len(missing),
            which,
            ", ".join(missing),
        )
    if root is not None:
        register_all_builtin(root)
    # Copies, since nodes of a config belong to one parent.
    return [L(build_test_loader)(dataset=name, **copy.deepcopy(loader_options)) for name in found]


def summarize_odinw(
    results: Mapping[str, Mapping[str, Any]], which: int | str = 13, *, split: str = "test"
) -> dict[str, Any]:
    """AP of each set and their mean.

    Args:
        results: by data set name, those of its evaluator: ``{"bbox": {"AP": ...}}``. Other data
            sets may be among them.
        which, split: as of :func:`find_odinw_sets`.

    Returns:
        ``sets``, AP in percent by the name of the set (without "odinw_" and split); ``missing``,
        the names of sets without AP; ``mean``, over the sets that have one; and ``title``, which
        says what the mean is. Only that of all sets is called "ODinW-13 average".

    Raises:
        ValueError: there is no AP of any of the sets.
    """
    sets: dict[str, float] = {}
    missing: list[str] = []
    for key, name in _names(which, split).items():
        value = results.get(name, {}).get("bbox", {}).get("AP")
        # NaN, or null in json: the file holds no box to find.
        if value is None or not math.isfinite(value):
            missing.append(key)
        else:
            sets[key] = float(value)
    if not sets:
        raise ValueError(
            f"There is no AP of any set of ODinW-{which} (split {split!r}) among the results of: "
            f"{', '.join(results) or 'nothing'}."
        )
    total = len(sets) + len(missing)
    return {
        "title": f"average of {len(sets)} of {total}" if missing else f"ODinW-{which} average",
        "mean": sum(sets.values()) / len(sets),
        "sets": sets,
        "missing": missing,
    }


def odinw_table(summary: Mapping[str, Any]) -> str:
    """The result of :func:`summarize_odinw` for reading, a line for each set."""
    rows = [*summary["sets"].items(), *((key, None) for key in summary["missing"])]
    rows.append((summary["title"], summary["mean"]))
    return tabulate(
        rows,
        headers=["set", "AP in %"],
        floatfmt=".2f",
        tablefmt="pipe",
        missingval="missing",
        disable_numparse=[0],
    )


def save_odinw_summary(summary: Mapping[str, Any], output_dir: str | os.PathLike[str]) -> Path:
    """Write ``odinw.json`` in a folder, and log the table; the path of the file."""
    path = Path(output_dir) / "odinw.json"
    save_json(dict(summary), path)
    logger.info("ODinW:\n%s", odinw_table(summary))
    return path


def odinw_summary(which: int | str = 13, *, split: str = "test") -> Callable[..., None]:
    """For the node ``summary`` of a recipe: what makes and saves the summary of its results.

    Args:
        which, split: as of :func:`find_odinw_sets`.

    Returns:
        A function of the results of all data sets and of the output folder.
    """

    def summarize(results: Mapping[str, Mapping[str, Any]], output_dir: str) -> None:
        save_odinw_summary(summarize_odinw(results, which, split=split), output_dir)

    return summarize


def _names(which: int | str, split: str) -> dict[str, str]:
    """Name in the catalogue by name of the set."""
    if str(which) not in _SETS:
        raise ValueError(f"which must be one of {', '.join(_SETS)}, got {which!r}.")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
    return {key: f"odinw_{key}_{split}" for key in _SETS[str(which)]}


def _json_file(name: str, root: str | None) -> str:
    if root is None:
        return MetadataCatalog.get(name).json_file
    return os.path.join(os.path.expanduser(root), BUILTIN[name].json_file)
