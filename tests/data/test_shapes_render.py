"""Geometry and pixels of generated scenes agree with what the annotations say."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from pycocotools import mask as mask_api

from fiber_d2.data.shapes_params import COLORS, SHAPES, ShapesParams
from fiber_d2.data.shapes_render import coverage
from fiber_d2.data.shapes_scene import clip_polygon, make_scene, polygon_area
from fiber_d2.data.shapes_write import picture

PARAMS = ShapesParams()


def mask_of(polygon, side):
    """Mask by another implementation than the renderer's, bool (side, side)."""
    rle = mask_api.merge(mask_api.frPyObjects([polygon.ravel().tolist()], side, side))
    return mask_api.decode(rle).astype(bool)


def scenes(params=PARAMS, count=25):
    return [make_scene(params, "train", index) for index in range(count)]


def test_boxes_are_tight_on_what_is_drawn():
    side = PARAMS.image_size
    for scene in scenes():
        for shape in scene.objects:
            drawn = coverage(shape.polygon, 0, 0, side, side) > 0.25
            y, x = np.nonzero(drawn)
            found = (x.min(), y.min(), x.max() + 1, y.max() + 1)
            assert np.abs(np.subtract(found, shape.box)).max() <= 1.25


def test_coverage_is_the_area_of_the_shape():
    side = PARAMS.image_size
    for scene in scenes():
        for shape in scene.objects:
            covered = coverage(shape.polygon, 0, 0, side, side).sum()
            assert covered == pytest.approx(polygon_area(shape.clipped), rel=0.06)


def test_visible_share_and_sizes():
    low, high = (np.array(r) * PARAMS.image_size for r in (PARAMS.small, PARAMS.large))
    sizes = []
    for scene in scenes(count=40):
        assert PARAMS.min_objects <= len(scene.objects) <= PARAMS.max_objects
        covered = np.zeros((scene.size, scene.size), dtype=bool)
        for shape, visible in reversed(list(zip(scene.objects, scene.visible))):
            mask = mask_of(shape.clipped, scene.size)
            seen = (mask & ~covered).sum() / polygon_area(shape.polygon)
            assert visible >= PARAMS.min_visible
            assert seen == pytest.approx(visible, abs=0.09)
            covered |= mask
            extent = np.ptp(shape.polygon, axis=0).max()
            within = {
                "small": low[0] <= extent <= low[1],
                "large": high[0] <= extent <= high[1],
                None: low[1] + 2 < extent < high[0] - 2,
            }
            assert within[shape.size]
            x1, y1, x2, y2 = shape.box
            assert min(x2 - x1, y2 - y1) >= 12
            assert 0 <= x1 and 0 <= y1 and max(x2, y2) <= scene.size
            sizes.append(shape.size)
    assert set(sizes) == {"small", "large", None}


def palette_of(names):
    return np.array([colorsys.hsv_to_rgb(h / 360, s, v) for h, s, v in map(COLORS.get, names)])


def test_later_objects_cover_earlier_ones():
    names = list(PARAMS.colors)
    palette, right = palette_of(names), []
    for index, scene in enumerate(scenes(count=80)):
        pixels = picture(scene, PARAMS, "train", index) / 255
        masks = [mask_of(shape.clipped, scene.size) for shape in scene.objects]
        for front in range(len(masks)):
            above = np.any([np.zeros_like(masks[0]), *masks[front + 1 :]], axis=0)
            for back in range(front):
                both = masks[front] & masks[back] & ~above
                if both.sum() >= 40 and scene.objects[front].color != scene.objects[back].color:
                    median = np.median(pixels[both], axis=0)
                    nearest = np.abs(palette - median).sum(axis=1).argmin()
                    right.append(names[nearest] == scene.objects[front].color)
    assert len(right) > 10
    assert np.mean(right) > 0.85


@pytest.mark.parametrize(
    "params",
    [PARAMS, ShapesParams(colors=tuple(COLORS), shapes=tuple(SHAPES), image_size=192)],
    ids=["default", "all words"],
)
def test_pixels_have_the_color_that_the_words_say(params):
    """The visible inside of an object is nearer to its own colour than to any other."""
    names = list(params.colors)
    palette, right = palette_of(names), []
    for index, scene in enumerate(scenes(params)):
        pixels = picture(scene, params, "train", index) / 255
        covered = np.zeros((scene.size, scene.size), dtype=bool)
        for shape in reversed(scene.objects):
            mask = mask_of(shape.clipped, scene.size)
            center = shape.polygon.mean(axis=0)
            inside = mask_of(
                clip_polygon(center + (shape.polygon - center) * 0.7, scene.size), scene.size
            )
            inside &= ~covered
            covered |= mask
            if inside.sum() >= 20:
                # Lighter and darker tones of the texture and the shading are of the same colour.
                median = np.median(pixels[inside], axis=0)
                nearest = np.abs(palette - median).sum(axis=1).argmin()
                right.append(names[nearest] == shape.color)
    assert len(right) > 80
    assert np.mean(right) > (0.97 if params is PARAMS else 0.85)


def test_classes_are_balanced():
    counts = dict.fromkeys(PARAMS.class_names, 0)
    for scene in scenes(count=400):
        for shape in scene.objects:
            counts[shape.class_name] += 1
    total = sum(counts.values())
    assert len(counts) == 12
    assert all(abs(n - total / 12) < 5 * (total / 12) ** 0.5 for n in counts.values())


def test_clip_polygon_by_hand():
    square = np.array([(-2.0, 1.0), (3.0, 1.0), (3.0, 6.0), (-2.0, 6.0)])
    clipped = clip_polygon(square, 5)
    assert polygon_area(clipped) == pytest.approx(12)
    assert clipped.min(axis=0).tolist() == [0, 1] and clipped.max(axis=0).tolist() == [3, 5]
    triangle = np.array([(4.0, 4.0), (6.0, 4.0), (4.0, 6.0)])
    assert polygon_area(clip_polygon(triangle, 5)) == pytest.approx(1)
    inside = np.array([(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)])
    assert clip_polygon(inside, 5) == pytest.approx(inside)
