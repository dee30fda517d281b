"""Pixels of a generated scene: background, textures, soft shading, anti-aliased edges."""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

from .shapes_params import COLORS
from .shapes_scene import Scene, ShapeObject

SUPERSAMPLING = 4
OUTLINE = 0.011  # width of the dark rim over the image side
SHADOW = 0.022  # offset of the shadow over the image side


def render_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture of a scene, uint8 (H, W, 3), RGB."""
    canvas = _background(scene.background, scene.size, rng)
    for shape in scene.objects:
        _paint(canvas, shape, rng)
    grain = rng.normal(0.0, 2.0, size=canvas.shape[:2])[..., None]
    return (canvas + grain).clip(0, 255).round().astype(np.uint8)


def coverage(polygon: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    """Share of each pixel of a window that a polygon covers, float64 (height, width), 0 .. 1."""
    scale = SUPERSAMPLING
    window = Image.new("L", (width * scale, height * scale))
    points = ((polygon - (left, top)) * scale - 0.5).round(3)
    ImageDraw.Draw(window).polygon([tuple(p) for p in points.tolist()], fill=255)
    return np.asarray(window.reduce(scale), dtype=np.float64) / 255


def _paint(canvas: np.ndarray, shape: ShapeObject, rng: np.random.Generator) -> None:
    side = canvas.shape[0]
    shadow = SHADOW * side
    low = np.floor(shape.polygon.min(axis=0)).astype(int)
    high = np.ceil(shape.polygon.max(axis=0) + 2 * shadow).astype(int)
    left, top = (int(v) for v in low.clip(0))
    width, height = int(min(high[0], side)) - left, int(min(high[1], side)) - top
    target = canvas[top : top + height, left : left + width]

    soft = np.mean(
        [coverage(shape.polygon + shadow * k, left, top, width, height) for k in (0.6, 1.0, 1.4)],
        axis=0,
    )
    target *= 1 - 0.38 * soft[..., None]

    y, x = np.mgrid[top : top + height, left : left + width] + 0.5
    fill, rim = _colors(shape.color, rng)
    surface = fill * _shading(x, y, shape, rng)[..., None]
    amount = _texture(x, y, shape, side, rng)[..., None]
    surface = surface * (1 - amount) + _texture_color(fill) * amount

    center = (shape.polygon.min(axis=0) + shape.polygon.max(axis=0)) / 2
    extent = np.ptp(shape.polygon, axis=0).max()
    inner = center + (shape.polygon - center) * (1 - 2 * OUTLINE * side / extent)
    whole = coverage(shape.polygon, left, top, width, height)[..., None]
    inside = coverage(inner, left, top, width, height)[..., None]
    painted = surface * inside + rim * (1 - inside)
    target *= 1 - whole
    target += painted * whole


def _colors(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    hue, saturation, value = COLORS[name]
    hue = (hue + rng.uniform(-6, 6)) / 360 % 1
    saturation = float(np.clip(saturation + rng.uniform(-0.1, 0.1) * (saturation > 0.1), 0, 1))
    value = float(np.clip(value + rng.uniform(-0.08, 0.08), 0.05, 1))
    fill = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
    rim = np.array(colorsys.hsv_to_rgb(hue, saturation, value * 0.5)) * 255
    return fill, rim


def _texture_color(fill: np.ndarray) -> np.ndarray:
    """A lighter tone of dark colours and a darker one of light colours, of the same hue."""
    return fill * 0.62 if fill.mean() > 110 else fill + (255 - fill) * 0.4


def _shading(
    x: np.ndarray, y: np.ndarray, shape: ShapeObject, rng: np.random.Generator
) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    center, extent = shape.polygon.mean(axis=0), np.ptp(shape.polygon, axis=0).max()
    along = ((x - center[0]) * math.cos(angle) + (y - center[1]) * math.sin(angle)) / extent
    return 1 + rng.uniform(0.05, 0.2) * along


def _texture(
    x: np.ndarray, y: np.ndarray, shape: ShapeObject, side: int, rng: np.random.Generator
) -> np.ndarray:
    """How much of the texture's tone each pixel takes, 0 .. 1."""
    angle = rng.uniform(0, math.pi)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    if shape.texture == "striped":
        period = rng.uniform(0.045, 0.065) * side
        return _soft_step(np.sin(2 * math.pi * u / period), 2 * math.pi / period)
    if shape.texture == "dotted":
        period = rng.uniform(0.055, 0.075) * side
        du, dv = (w - period * np.round(w / period) for w in (u, v))
        return _soft_step(0.3 * period - np.hypot(du, dv), 1.0)
    return np.zeros_like(x)


def _soft_step(signed: np.ndarray, slope: float) -> np.ndarray:
    """0 below zero, 1 above, with an edge one pixel wide where ``slope`` is the rise per pixel."""
    return np.clip(signed / slope + 0.5, 0, 1)


def _background(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Muted colours, so that every shape stands out; float64 (side, side, 3), 0 .. 255."""
    first = _muted(rng)
    second = first * rng.uniform(0.72, 0.88)
    y, x = np.mgrid[:side, :side] + 0.5
    angle = rng.uniform(0, math.pi)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    if kind == "plain":
        amount = np.zeros_like(x)
    elif kind == "shaded":
        amount = (u - u.min()) / np.ptp(u)
        second = first * rng.uniform(0.45, 0.65)
    elif kind == "grainy":
        amount = rng.normal(0.5, 0.35, size=x.shape)
    elif kind == "striped":
        period = rng.uniform(0.12, 0.22) * side
        amount = _soft_step(np.sin(2 * math.pi * u / period), 2 * math.pi / period)
    elif kind == "checked":
        period = rng.uniform(0.2, 0.34) * side
        waves = np.sin(2 * math.pi * u / period) * np.sin(2 * math.pi * v / period)
        amount = _soft_step(waves, 4 / period)
    else:
        amount = _clouds(side, rng)
        second = first * rng.uniform(0.5, 0.7)
    return first + (second - first) * amount[..., None]


def _muted(rng: np.random.Generator) -> np.ndarray:
    color = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.02, 0.2), rng.uniform(0.5, 0.92))
    return np.array(color) * 255


def _clouds(side: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of three scales, 0 .. 1."""
    total = np.zeros((side, side))
    for cells, weight in ((3, 0.55), (6, 0.3), (12, 0.15)):
        coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
        fine = coarse.resize((side, side), Image.Resampling.BICUBIC)
        total += weight * np.asarray(fine, dtype=np.float64) / 255
    return (total - total.min()) / np.ptp(total)
