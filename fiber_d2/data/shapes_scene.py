"""What stands where: the objects of one generated image, as geometry without pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .shapes_params import BACKGROUNDS, SPLITS, TEXTURES, ShapesParams

MAX_BOX_IOU = 0.35
MAX_OUTSIDE = 0.12  # of the extent, beyond the image border
MIN_SIDE = 0.07  # of the image side, for the shorter side of a box
PLACEMENT_TRIES = 40
SCENE_TRIES = 50
TEXTURE_SHARES = (0.4, 0.3, 0.3)
CIRCLE_VERTICES = 40


@dataclass(frozen=True, eq=False)
class ShapeObject:
    """One shape of an image.

    Attributes:
        color, shape, texture: words; the texture is seen but never named.
        size: "small", "large", or None for what is neither.
        polygon: float64 (V, 2), x and y of the outline in pixels, not clipped to the image.
            Pixel ``i`` covers the range ``i .. i + 1``.
        clipped: float64 (V', 2), the part of the polygon within the image.
        box: x1, y1, x2, y2 of ``clipped`` in pixels.
    """

    color: str
    shape: str
    size: str | None
    texture: str
    polygon: np.ndarray
    clipped: np.ndarray
    box: tuple[float, float, float, float]

    @property
    def center(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def class_name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, eq=False)
class Scene:
    """The objects of an image from the rearmost to the foremost.

    Attributes:
        visible: per object the share of the whole shape that is seen, 0 .. 1.
    """

    size: int
    background: str
    objects: tuple[ShapeObject, ...]
    visible: tuple[float, ...]


def scene_rng(params: ShapesParams, split: str, index: int, stream: int) -> np.random.Generator:
    """Random numbers of one image and one use of them (``stream``), whoever asks and when."""
    return np.random.default_rng([params.seed, SPLITS.index(split), index, stream])


def make_scene(params: ShapesParams, split: str, index: int) -> Scene:
    """The scene of image ``index`` of a split.

    Raises:
        ValueError: where the parameters leave no room for ``min_objects`` shapes.
    """
    rng = scene_rng(params, split, index, stream=0)
    for _ in range(SCENE_TRIES):
        scene = _try_scene(params, rng)
        if len(scene.objects) >= params.min_objects:
            return scene
    raise ValueError(
        f"shapes: no room for {params.min_objects} shapes in an image; lower min_objects, "
        "min_visible or the sizes small and large."
    )


def _try_scene(params: ShapesParams, rng: np.random.Generator) -> Scene:
    background = str(rng.choice(BACKGROUNDS))
    wanted = int(rng.integers(params.min_objects, params.max_objects + 1))
    classes = rng.integers(len(params.class_names), size=wanted)
    if wanted > 1 and rng.random() < params.twin_share:
        first, second = rng.choice(wanted, size=2, replace=False)
        classes[second] = classes[first]
    objects: list[ShapeObject] = []
    full_masks: list[np.ndarray] = []  # with a border, so that hidden parts outside count
    seen_masks: list[np.ndarray] = []
    for number in classes:
        color, shape = params.class_names[int(number)].split(" ")
        for _ in range(PLACEMENT_TRIES):
            candidate = _draw_object(params, rng, color, shape)
            x1, y1, x2, y2 = candidate.box
            if min(x2 - x1, y2 - y1) < MIN_SIDE * params.image_size:
                continue
            if any(box_iou(candidate.box, other.box) > MAX_BOX_IOU for other in objects):
                continue
            full = _mask(candidate.polygon, params.image_size)
            inside = _inside(full, params.image_size)
            seen = [mask & ~full for mask in seen_masks] + [inside]
            shares = [mask.sum() / whole.sum() for mask, whole in zip(seen, [*full_masks, full])]
            if min(shares) >= params.min_visible:
                objects.append(candidate)
                full_masks.append(full)
                seen_masks = seen
                break
    visible = tuple(float(mask.sum() / whole.sum()) for mask, whole in zip(seen_masks, full_masks))
    return Scene(params.image_size, background, tuple(objects), visible)


def _draw_object(
    params: ShapesParams, rng: np.random.Generator, color: str, shape: str
) -> ShapeObject:
    side = params.image_size
    middle = (params.small[1] + params.large[0]) / 2
    slack = (params.large[0] - params.small[1]) / 6  # keeps the middle clear of both ranges
    ranges = {"small": params.small, None: (middle - slack, middle + slack), "large": params.large}
    draw = rng.random()
    size = None if draw < params.middle_share else ("small", "large")[int(rng.integers(2))]
    extent = rng.uniform(*ranges[size]) * side
    outline = unit_outline(shape, rng)
    outline = outline * (extent / np.ptp(outline, axis=0).max())
    low, high = outline.min(axis=0), outline.max(axis=0)
    outside = MAX_OUTSIDE * (high - low)
    shift = rng.uniform(-low - outside, side - high + outside)
    polygon = outline + shift
    clipped = clip_polygon(polygon, side)
    (x1, y1), (x2, y2) = clipped.min(axis=0), clipped.max(axis=0)
    return ShapeObject(
        color=color,
        shape=shape,
        size=size,
        texture=str(rng.choice(TEXTURES, p=TEXTURE_SHARES)),
        polygon=polygon,
        clipped=clipped,
        box=(float(x1), float(y1), float(x2), float(y2)),
    )


def unit_outline(shape: str, rng: np.random.Generator) -> np.ndarray:
    """An outline of the shape around the origin, float64 (V, 2), a little turned."""
    if shape in ("circle", "ellipse"):
        outline = _regular(CIRCLE_VERTICES)
        if shape == "ellipse":
            outline = outline * (1.0, rng.uniform(0.5, 0.65))
            return _turn(outline, rng.uniform(0, 180))
        return outline
    if shape == "star":
        radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
        return _turn(_regular(10) * radii[:, None], -90 + rng.uniform(-15, 15))
    if shape == "cross":
        a = 0.34
        quarter = np.array([(a, -1), (a, -a), (1, -a)])
        return np.concatenate([_turn(quarter, 90 * k + 0.0) for k in range(4)]) @ _rotation(
            rng.uniform(-12, 12)
        )
    if shape == "triangle":
        return _turn(_regular(3), -90 + rng.uniform(-20, 20))
    if shape == "hexagon":
        return _turn(_regular(6), rng.uniform(0, 60))
    if shape == "diamond":
        return _turn(_regular(4) * (0.7, 1.0), rng.uniform(-8, 8))
    square = np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    if shape == "rectangle":
        square = square * ((1.0, 0.5) if rng.random() < 0.5 else (0.5, 1.0))
    return _turn(square, rng.uniform(-12, 12))


def _regular(vertices: int) -> np.ndarray:
    angle = np.arange(vertices) * (2 * math.pi / vertices)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _rotation(degrees: float) -> np.ndarray:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([(cos, sin), (-sin, cos)])


def _turn(outline: np.ndarray, degrees: float) -> np.ndarray:
    return outline @ _rotation(degrees)


def clip_polygon(polygon: np.ndarray, side: float) -> np.ndarray:
    """The part of a polygon (V, 2) within 0 .. side, cut at one border after the other."""
    points = polygon
    for axis in (0, 1):
        for bound, sign in ((0.0, 1.0), (float(side), -1.0)):
            distance = sign * (points[:, axis] - bound)
            following, ahead = np.roll(points, -1, axis=0), np.roll(distance, -1)
            kept = []
            for point, d, after, d_after in zip(points, distance, following, ahead):
                if d >= 0:
                    kept.append(point)
                if (d >= 0) != (d_after >= 0):
                    crossing = point + (after - point) * (d / (d - d_after))
                    crossing[axis] = bound
                    kept.append(crossing)
            points = np.array(kept).reshape(-1, 2)
    return points


def polygon_area(polygon: np.ndarray) -> float:
    x, y = polygon[:, 0], polygon[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two XYXY boxes in continuous coordinates."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def _border(side: int) -> int:
    return math.ceil(0.1 * side)


def _mask(polygon: np.ndarray, side: int) -> np.ndarray:
    """Whole-pixel mask of a shape on a canvas with a border around the image."""
    border = _border(side)
    canvas = Image.new("1", (side + 2 * border,) * 2)
    points = (polygon + (border - 0.5)).round(3)
    ImageDraw.Draw(canvas).polygon([tuple(p) for p in points.tolist()], fill=1)
    return np.array(canvas)


def _inside(mask: np.ndarray, side: int) -> np.ndarray:
    border = _border(side)
    inside = np.zeros_like(mask)
    window = slice(border, border + side)
    inside[window, window] = mask[window, window]
    return inside
