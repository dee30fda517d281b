"""Class names as a caption: does every class have tokens of its own?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from fiber_d2.data.class_prompts import prompts_in_order
from fiber_d2.text import build_detection_prompts, clean_name
from fiber_d2.text.prompts import Templates, detection_caption

from .checks import Finding
from .sources import Source
from .values import is_text, show


class Class(NamedTuple):
    """A class, and how it is asked for."""

    id: Any
    name: str
    template: dict[str, str] | str | None

    @property
    def text(self) -> str:
        """What stands for it in the caption, without the words of its template."""
        if isinstance(self.template, dict) and "name" in self.template:
            return self.template["name"]
        return clean_name(self.name)

    @property
    def caption(self) -> str:
        """A caption of this class alone."""
        return detection_caption([self.name], templates=_templates([self]))[0]

    def __str__(self) -> str:
        return f"class {show(self.id)}, {show(self.name)}"


def check_classes(
    source: Source,
    classes: Sequence[tuple[Any, Any]],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    separator: str = ". ",
) -> Iterator[Finding]:
    """Classes that the model cannot be asked for, or cannot tell apart.

    Args:
        classes: id and name of each.
        max_tokens: limit of a caption's tokens, special tokens included.
        separator: stands between the classes of a caption.
    """
    names = [name for _, name in classes]
    try:
        templates = _templates_of(source, names)
    except ValueError as error:
        yield Finding("category-entry", str(error))
        templates = [None] * len(names)
    usable = []
    for (class_id, name), template in zip(classes, templates):
        if not is_text(name):
            yield Finding("category-entry", f"class {show(class_id)}: name {show(name)}")
            continue
        entry = Class(class_id, name, template)
        if entry.text.strip():
            usable.append(entry)
        else:
            yield _no_token(entry)
    if not usable:
        return
    encoded = tokenizer([entry.caption for entry in usable])["input_ids"]
    lengths = np.array([len(ids) for ids in encoded])
    for index in np.flatnonzero(lengths > max_tokens):
        yield Finding(
            "class-long",
            f"{usable[index]}: {lengths[index]} tokens, special tokens included; the limit is "
            f"{max_tokens}",
        )
    yield from _alike(usable, tokenizer)
    fitting = [usable[index] for index in np.flatnonzero(lengths <= max_tokens)]
    if fitting:
        yield from _captions(fitting, tokenizer, max_tokens, separator)


def _templates_of(source: Source, names: Sequence[str]) -> list[Any]:
    """The template of each class; published ones serve the published classes only."""
    other = source.published_classes is not None and list(source.published_classes) != list(names)
    if source.prompts is None or other:
        return [None] * len(names)
    prompts = prompts_in_order(source.prompts, names, source.label)
    return [prompts] * len(names) if isinstance(prompts, str) else prompts


def _templates(classes: Sequence[Class]) -> Templates | None:
    """As :func:`~fiber_d2.text.build_detection_prompts` takes them; all are of one kind."""
    first = classes[0].template
    return [entry.template for entry in classes] if isinstance(first, dict) else first


def _no_token(entry: Class) -> Finding:
    return Finding("class-no-token", f"{entry}, reads {show(entry.text)} in the caption")


def _alike(classes: Sequence[Class], tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    tokens = tokenizer([entry.text.strip() for entry in classes], add_special_tokens=False)
    first: dict[tuple[int, ...], Class] = {}
    for entry, ids in zip(classes, tokens["input_ids"]):
        other = first.setdefault(tuple(ids), entry)
        if other.name != entry.name:  # equal names are the schema's
            yield Finding("class-alike", f"{entry}, has the same tokens as {other}")


def _captions(
    classes: Sequence[Class],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    separator: str,
) -> Iterator[Finding]:
    prompts = build_detection_prompts(
        tokenizer,
        [entry.name for entry in classes],
        max_tokens=max_tokens,
        separator=separator,
        templates=_templates(classes),
        on_empty="keep",
    )
    for prompt in prompts:
        empty = prompt.target_ids[prompt.positive_map.sum(dim=1) == 0]
        for index in empty.tolist():
            yield _no_token(classes[index])
    lengths = [str(len(prompt.input_ids)) for prompt in prompts]
    shown = ", ".join([*lengths[:10], *(["..."] if len(lengths) > 10 else [])])
    yield Finding(
        "class-captions",
        f"classes: {len(classes)}, captions: {len(prompts)}, tokens: {shown} of {max_tokens}",
    )
