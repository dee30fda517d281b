"""The words that a data set brings along: names for its classes, and templates to ask with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Union

from detectron2.utils.logger import log_first_n

from .categories import ClassNames

Template = Mapping[str, str]
ClassPrompts = Union[str, Sequence[Template], Mapping[str, Template]]
"""How to word classes: a format such as ``"a {} on a road"``; or mappings with any of ``prefix``,
``name`` and ``suffix``, for each class in order, or for some classes by their names."""

_PARTS = ("prefix", "name", "suffix")


def plain_class_names(class_names: ClassNames | None) -> ClassNames | None:
    """``class_names`` in plain Python, with ids that came as text (as in json) made numbers.

    Raises:
        ValueError: a name is no text.
    """
    if class_names is None:
        return None
    is_mapping = isinstance(class_names, Mapping)
    names = list(class_names.values() if is_mapping else class_names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong or isinstance(class_names, str):
        found = wrong[0] if wrong else class_names
        raise ValueError(
            "class_names must be a list of texts, or texts by category id; it holds "
            f"{found!r}. (A yaml reads a bare no or 1 as something else: put it in quotes.)"
        )
    if not is_mapping:
        return names
    ids = [int(key) if isinstance(key, str) and key.isdecimal() else key for key in class_names]
    return dict(zip(ids, names))


def plain_prompts(prompts: ClassPrompts | None) -> ClassPrompts | None:
    """``prompts`` in plain Python.

    Raises:
        ValueError: they are none of the forms of :data:`ClassPrompts`.
    """
    if prompts is None or isinstance(prompts, str):
        return prompts
    if isinstance(prompts, Mapping):
        return {name: _plain_template(template) for name, template in prompts.items()}
    return [_plain_template(template) for template in prompts]


def _plain_template(template: Any) -> dict[str, str]:
    ok = isinstance(template, Mapping) and all(
        key in _PARTS and isinstance(value, str) for key, value in template.items()
    )
    if not ok:
        raise ValueError(
            f"The prompt {template!r} must be a mapping with any of {', '.join(_PARTS)}, all texts."
        )
    return dict(template)


def prompts_in_order(
    prompts: ClassPrompts, names: Sequence[str], dataset_name: str
) -> str | list[dict[str, str]]:
    """The prompts as :func:`~fiber_d2.text.build_detection_prompts` takes its templates.

    A class without a prompt of its own gets an empty mapping, which stands for its cleaned name.

    Args:
        prompts: as of :func:`plain_prompts`.
        names: of the classes, by contiguous id.
        dataset_name: named in messages.

    Raises:
        ValueError: there are not as many prompts as classes, or one is for no class.
    """
    if isinstance(prompts, str):
        return prompts
    if isinstance(prompts, Mapping):
        unknown = [name for name in prompts if name not in names]
        if unknown:
            raise ValueError(
                f"The data set {dataset_name!r} has prompts for {unknown}, but its classes are "
                f"{list(names)}."
            )
        return [dict(prompts.get(name, {})) for name in names]
    if len(prompts) != len(names):
        raise ValueError(
            f"The data set {dataset_name!r} has {len(prompts)} prompts for {len(names)} classes: "
            f"{list(names)}."
        )
    return list(prompts)


def has_published_classes(
    published: Sequence[str], names: Sequence[str], dataset_name: str, json_file: str
) -> bool:
    """Whether a file has the classes of the published one; a warning says where it has not."""
    if list(published) == list(names):
        return True
    log_first_n(
        logging.WARNING,
        f"{json_file} is another version of {dataset_name} than the published one: its classes "
        f"are {list(names)} instead of {list(published)}. They are used as they are, without the "
        "published prompts.",
        name=__name__,
        key="message",
    )
    return False
