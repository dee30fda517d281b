"""Referring expressions: words that single out one object of a scene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .shapes_language import Description, descriptions_of
from .shapes_params import ANY_SHAPE, RELATIONS, ShapesParams
from .shapes_scene import Scene, ShapeObject

ATTRIBUTE = "shapes_attribute"
RELATION = "shapes_relation"

# Over the image side: how far the target must lie on the named side of the reference, and how
# far every other candidate must lie on the other one.
MARGIN = 0.12
OTHER_MARGIN = 0.05
# Over the distance across: how far the distance along must exceed it to be "left of", and stay
# below it to be clearly not, where candidates on the same side are allowed (hard relations).
CONE = 1.0
HARD_CONE = 1.4


@dataclass(frozen=True)
class Expression:
    """A caption that refers to one object.

    Attributes:
        group: ``ATTRIBUTE`` or ``RELATION``.
        text: the caption.
        spans: ``[begin, end)`` characters that are true of the object: its name, and where it is
            ("left of"). The name of the reference is not.
        target: index of the object.
        candidates: indices one would choose among without the words of the group: the objects
            that fit the head for a relation, all objects for attributes.
        reference: the other object of a relation.
    """

    group: str
    text: str
    spans: tuple[tuple[int, int], ...]
    target: int
    candidates: tuple[int, ...]
    reference: int | None = None


def make_expressions(
    scene: Scene, params: ShapesParams, rng: np.random.Generator
) -> list[Expression]:
    """Expressions of both groups, each up to its number per image, in random order."""
    chosen: list[Expression] = []
    for found, most in (
        (list(attribute_expressions(scene)), params.attributes_per_image),
        (
            list(relation_expressions(scene, hard=params.hard_relations)),
            params.relations_per_image,
        ),
    ):
        order = rng.permutation(len(found))[:most]
        chosen.extend(found[i] for i in order)
    return chosen


def attribute_expressions(scene: Scene) -> Iterator[Expression]:
    """All expressions by shape and size or colour, or both, that fit exactly one object.

    Another object of the scene must share the target's colour or shape.
    """
    objects = scene.objects
    everything = tuple(range(len(objects)))
    for target, shape in enumerate(objects):
        if not any(
            other is not shape and (other.color == shape.color or other.shape == shape.shape)
            for other in objects
        ):
            continue
        for description in descriptions_of(shape):
            if description.shape is None or description.kinds() == ["shape"]:
                continue
            if description.matches(objects) == (target,):
                text = f"the {description.words()}"
                yield Expression(ATTRIBUTE, text, ((0, len(text)),), target, everything)


def relation_expressions(scene: Scene, hard: bool = False) -> Iterator[Expression]:
    """All expressions "the red circle left of the blue square" that fit exactly one object.

    Two or more objects fit the head, one object fits the reference and none fits both. Heads are
    named by shape, with or without the colour; references by the fewest words that do.
    """
    objects = scene.objects
    heads: dict[Description, tuple[int, ...]] = {}
    for shape in objects:
        for head in (
            Description(None, shape.color, shape.shape),
            Description(None, None, shape.shape),
        ):
            heads[head] = head.matches(objects)
    for head, candidates in heads.items():
        if len(candidates) < 2:
            continue
        for reference, shape in enumerate(objects):
            if reference in candidates:
                continue
            words = _reference_words(reference, shape, objects)
            if words is None:
                continue
            for relation in RELATIONS:
                target = _target(scene, candidates, reference, relation, hard)
                if target is not None:
                    start = f"the {head.words()}"
                    text = f"{start} {relation} the {words}"
                    side = len(start) + 1
                    spans = ((0, len(start)), (side, side + len(relation)))
                    yield Expression(RELATION, text, spans, target, candidates, reference)


def _reference_words(
    reference: int, shape: ShapeObject, objects: tuple[ShapeObject, ...]
) -> str | None:
    """Colour and shape, with the size in front where it is needed; None where nothing will do."""
    for size in (None, shape.size):
        description = Description(size, shape.color, shape.shape)
        if description.matches(objects) == (reference,):
            return description.words()
    return None


def _target(
    scene: Scene, candidates: tuple[int, ...], reference: int, relation: str, hard: bool
) -> int | None:
    """The one candidate that stands in the relation; None where there is none or any doubt."""
    axis = 0 if relation in ("left of", "right of") else 1
    sign = -1.0 if relation in ("left of", "above") else 1.0
    centers = np.array([scene.objects[i].center for i in candidates])
    offset = centers - np.array(scene.objects[reference].center)
    along, across = sign * offset[:, axis], np.abs(offset[:, 1 - axis])
    yes = (along >= MARGIN * scene.size) & (along >= CONE * across)
    no = along <= -OTHER_MARGIN * scene.size
    if hard:
        # "Above" is clearly not "left of", however far to the left it is.
        no |= (across >= HARD_CONE * along) & (across >= MARGIN * scene.size)
    if yes.sum() != 1 or (yes | no).sum() != len(candidates):
        return None
    place = int(np.argmax(yes))
    if hard and place == int(np.argmax(along)):
        return None
    return candidates[place]


def vocabulary(params: ShapesParams) -> list[str]:
    """Words that referring expressions are made of, for tokenizers."""
    relation_words = {word for relation in RELATIONS for word in relation.split()}
    return sorted(
        {*params.colors, *params.shapes, ANY_SHAPE[0], "small", "large", "the", *relation_words}
    )
