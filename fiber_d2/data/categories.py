"""The categories of a COCO json: which of them are classes, and what the classes are called."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

from detectron2.utils.logger import log_first_n

BACKGROUND = "__background__"

ClassNames = Union[Sequence[str], Mapping[int, str]]
"""Names of all classes in order, or of some by their category id."""


@dataclass(frozen=True)
class Categories:
    """The classes of a file.

    Args:
        names: by contiguous id.
        contiguous: category id to contiguous id, in the order of the file.
        left_out: ids of the entries that are no class.
        frequencies: LVIS's "r", "c" or "f" by contiguous id, None where the file does not tell.
    """

    names: list[str]
    contiguous: dict[Any, int]
    left_out: frozenset
    frequencies: list[str | None]

    def index_of(self, annotation: Mapping[str, Any], json_file: str) -> int | None:
        """The contiguous id of an annotation, None where its category is no class.

        Raises:
            ValueError: the file has no such category.
        """
        category_id = annotation.get("category_id")
        known = isinstance(category_id, (int, str))
        if known and category_id in self.contiguous:
            return self.contiguous[category_id]
        if known and category_id in self.left_out:
            return None
        raise ValueError(
            f"The annotation {annotation.get('id')} of {json_file} has the category id "
            f"{category_id!r}, which is not among the file's categories."
        )


def read_categories(
    content: Mapping[str, Any], json_file: str, class_names: ClassNames | None = None
) -> Categories:
    """The classes of a parsed file, see :func:`~fiber_d2.data.load_detection_json`.

    Two classes of one name stay two, since that is how the file is scored, but a warning names
    them: words cannot tell them apart, so that each is found wherever the other is.

    Args:
        content: with the list ``categories``; its ``annotations`` say which of them are used.
        json_file: named in messages.
        class_names: other names: for all classes in order, or by category id.

    Raises:
        ValueError: the categories are faulty, or ``class_names`` do not fit them.
    """
    categories = content["categories"]
    for category in categories:
        require(category, ("id", "name"), "category", json_file)
        if not (isinstance(category["id"], (int, str)) and isinstance(category["name"], str)):
            raise ValueError(
                f"The annotation file {json_file} has the category {category['id']!r} with the "
                f"name {category['name']!r}: the id must be a number and the name a text."
            )
    if len({category["id"] for category in categories}) < len(categories):
        raise ValueError(f"The annotation file {json_file} repeats an id in its categories.")
    classes = _classes(categories, content.get("annotations") or ())
    if not classes:
        raise ValueError(f"The annotation file {json_file} has no categories.")
    contiguous = {category["id"]: index for index, category in enumerate(classes)}
    names = _renamed([category["name"] for category in classes], contiguous, class_names, json_file)
    _warn_of_repeated(names, list(contiguous), json_file)
    return Categories(
        names=names,
        contiguous=contiguous,
        left_out=frozenset(c["id"] for c in categories if c["id"] not in contiguous),
        frequencies=[category.get("frequency") for category in classes],
    )


def _classes(
    categories: Sequence[dict[str, Any]], annotations: Iterable[Any]
) -> list[dict[str, Any]]:
    groups = [category.get("supercategory") for category in categories]

    def is_candidate(category: dict[str, Any]) -> bool:
        """Whether it would be no class, did no annotation use it."""
        # Roboflow exports begin with the name of the project, which the classes are grouped by.
        is_group = (
            category["id"] == 0
            and category.get("supercategory") == "none"
            and category["name"] in groups
        )
        return is_group or category["name"].strip().lower() == "background"

    candidates = {category["id"] for category in categories if is_candidate(category)}
    if candidates:
        ids = (a.get("category_id") for a in annotations if isinstance(a, dict))
        candidates -= {category_id for category_id in ids if isinstance(category_id, (int, str))}
    return [c for c in categories if c["name"] != BACKGROUND and c["id"] not in candidates]


def _renamed(
    names: list[str],
    contiguous: Mapping[Any, int],
    class_names: ClassNames | None,
    json_file: str,
) -> list[str]:
    if class_names is None:
        return names
    if isinstance(class_names, Mapping):
        unknown = [category_id for category_id in class_names if category_id not in contiguous]
        if unknown:
            raise ValueError(
                f"class_names has names for the category ids {unknown}, but the classes of "
                f"{json_file} have the ids {list(contiguous)}."
            )
        renamed = {contiguous[category_id]: name for category_id, name in class_names.items()}
        return [renamed.get(index, name) for index, name in enumerate(names)]
    if len(class_names) != len(names):
        raise ValueError(
            f"class_names has {len(class_names)} names, but {json_file} has {len(names)} classes: "
            f"{', '.join(names)}."
        )
    return list(class_names)


def _warn_of_repeated(names: Sequence[str], ids: Sequence[Any], json_file: str) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        where = "; ".join(
            f"{name!r} (category ids {', '.join(str(i) for i, n in zip(ids, names) if n == name)})"
            for name in repeated
        )
        # The key makes it once per message and process; the readers run several times.
        log_first_n(
            logging.WARNING,
            f"The annotation file {json_file} has several classes of one name: {where}. Words "
            "cannot tell them apart. Merge them in the file, or give them names of their own with "
            "class_names of register_coco_json.",
            name=__name__,
            key="message",
        )


def require(entry: Any, keys: Iterable[str], kind: str, json_file: str) -> None:
    """
    Raises:
        ValueError: an entry of a file is no object with these keys.
    """
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        which = f" {entry['id']!r}" if isinstance(entry, dict) and "id" in entry else ""
        raise ValueError(
            f"The annotation file {json_file} is not COCO json: the {kind}{which} lacks "
            f"{', '.join(missing)}."
        )
