"""What the generated shapes data set is made of: its parameters and its words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Raised whenever the same parameters would give other files than before.
FORMAT_VERSION = 2

# name -> (hue in degrees, saturation, value) of the middle of the colour
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (358.0, 0.86, 0.88),
    "green": (128.0, 0.75, 0.66),
    "blue": (222.0, 0.80, 0.88),
    "yellow": (52.0, 0.88, 0.96),
    "orange": (27.0, 0.90, 0.97),
    "purple": (276.0, 0.68, 0.74),
    "pink": (330.0, 0.48, 0.98),
    "cyan": (184.0, 0.75, 0.90),
    "brown": (22.0, 0.65, 0.48),
    "white": (0.0, 0.02, 0.98),
    "black": (0.0, 0.05, 0.10),
}

# singular -> plural
SHAPES: dict[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "diamond": "diamonds",
    "hexagon": "hexagons",
    "cross": "crosses",
    "rectangle": "rectangles",
    "ellipse": "ellipses",
}

ANY_SHAPE = ("shape", "shapes")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("plain", "shaded", "grainy", "striped", "checked", "cloudy")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}

SPLITS = ("train", "val")


@dataclass(frozen=True)
class ShapesParams:
    """Everything that decides the content of a generated data set.

    Attributes:
        seed: image ``i`` of a split depends on the seed, the split and ``i`` alone, so a larger
            set begins with the images of a smaller one.
        num_train, num_val: number of images of each split.
        image_size: side of the square images in pixels. Shapes scale with it.
        colors, shapes: words from ``COLORS`` and ``SHAPES``; each pair is a class.
        min_objects, max_objects: shapes per image, both ends included.
        small, large: extents (longer side of the shape) over ``image_size``: the ranges that are
            called "small" and "large". What lies between them is called neither.
        middle_share: share of the shapes whose size falls between the two ranges.
        min_visible: least share of a shape that neither other shapes nor the border may hide.
        twin_share: share of images in which one class is certain to occur twice; such pairs are
            what size words and relations are needed for.
        sentences_per_image: captions per image of the grounding annotations.
        attributes_per_image, relations_per_image: at most so many referring expressions of each
            group per image (every one there is, where there are fewer).
        train_relation_share: where given, expressions of the group in excess are left out of the
            training split until relational ones make up this share. The validation split keeps all.
        expressions_per_caption: most referring expressions in a caption of the mixed annotations.
        hard_relations: keep only relational expressions whose answer is not the candidate that
            lies furthest in the named direction, so that the reference object must be looked at.
        lvis_rare_max, lvis_common_max: most annotated training images of a class that is called
            rare or common; the LVIS annotations are thinned so that all three kinds occur.
        image_format: "jpg" (quality 95, no chroma subsampling) or "png".

    Raises:
        ValueError: names the parameter that cannot be used.
    """

    seed: int = 0
    num_train: int = 2000
    num_val: int = 400
    image_size: int = 128
    colors: tuple[str, ...] = ("red", "green", "blue", "yellow")
    shapes: tuple[str, ...] = ("circle", "square", "triangle")
    min_objects: int = 3
    max_objects: int = 6
    small: tuple[float, float] = (0.12, 0.19)
    large: tuple[float, float] = (0.29, 0.42)
    middle_share: float = 0.15
    min_visible: float = 0.7
    twin_share: float = 0.6
    sentences_per_image: int = 2
    attributes_per_image: int = 4
    relations_per_image: int = 6
    train_relation_share: float | None = None
    expressions_per_caption: int = 4
    hard_relations: bool = False
    lvis_rare_max: int = 10
    lvis_common_max: int = 100
    image_format: str = "jpg"

    def __post_init__(self) -> None:
        for name in ("colors", "shapes"):
            object.__setattr__(self, name, tuple(str(word) for word in getattr(self, name)))
        for name in ("small", "large"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        self._check(self.seed >= 0, "seed", "must not be negative")
        self._check(self.num_train >= 0, "num_train", "must not be negative")
        self._check(self.num_val >= 0, "num_val", "must not be negative")
        self._check(self.image_size >= 64, "image_size", "must be at least 64 pixels")
        for name, known in (("colors", COLORS), ("shapes", SHAPES)):
            words = getattr(self, name)
            self._check(
                len(words) > 0 and len(set(words)) == len(words) and set(words) <= set(known),
                name,
                f"must be different words out of {', '.join(known)}",
            )
        self._check(
            1 <= self.min_objects <= self.max_objects <= max(NUMBERS),
            "min_objects",
            f"and max_objects must satisfy 1 <= min <= max <= {max(NUMBERS)}",
        )
        sizes = (*self.small, *self.large)
        self._check(
            0.09 <= sizes[0] < sizes[1] < sizes[2] < sizes[3] <= 0.6,
            "small",
            "and large must be rising ranges apart from each other, within 0.09 .. 0.6",
        )
        shares = ("middle_share", "min_visible", "twin_share", "train_relation_share")
        for name in shares:
            value = getattr(self, name)
            self._check(value is None or 0 <= value <= 1, name, "must be within 0 .. 1")
        for name in ("sentences_per_image", "attributes_per_image", "relations_per_image"):
            self._check(getattr(self, name) >= 0, name, "must not be negative")
        self._check(self.expressions_per_caption > 0, "expressions_per_caption", "must be positive")
        self._check(
            0 < self.lvis_rare_max < self.lvis_common_max,
            "lvis_rare_max",
            "must be positive and below lvis_common_max",
        )
        self._check(self.image_format in ("jpg", "png"), "image_format", "must be jpg or png")

    def _check(self, good: bool, name: str, rule: str) -> None:
        if not good:
            raise ValueError(f"shapes: {name} {rule} (it is {getattr(self, name)!r}).")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ShapesParams:
        """Parameters from plain values; a name that is no parameter is a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"shapes: unknown parameter {', '.join(unknown)}; known are {', '.join(known)}."
            )
        return cls(**values)

    @property
    def class_names(self) -> list[str]:
        """The classes, "red circle" and so on; category id = 1 + place in this list."""
        return [f"{color} {shape}" for color in self.colors for shape in self.shapes]

    def num_images(self, split: str) -> int:
        return {"train": self.num_train, "val": self.num_val}[split]


def image_id(split: str, index: int) -> int:
    """A number that is unique over the splits, since they share one folder of Entities files."""
    return 1_000_000 * (1 + SPLITS.index(split)) + index


def image_name(params: ShapesParams, split: str, index: int) -> str:
    return f"{image_id(split, index)}.{params.image_format}"
