"""The drawing itself: labelled boxes, two halves under a caption, sheets of pictures."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from detectron2.utils.visualizer import Visualizer
from matplotlib import font_manager, patheffects
from PIL import Image, ImageDraw, ImageFont

from fiber_d2.files import replacing

PANEL_SIDE = 448  # pixels of the longer side of either half of a picture
_MARGIN = 10
_CAPTION_SIZE = 17
_TITLE_SIZE = 13
_LABEL_POINTS = 9
_LABEL_CHARACTERS = 28
_INK, _PALE_INK, _PAPER, _DESK = (25, 25, 25), (110, 110, 110), (255, 255, 255), (214, 214, 214)
# Bright enough to be read on the dark ground of a label; colours that few things have come first.
_PALETTE = tuple(
    tuple(channel / 255 for channel in color)
    for color in (
        (255, 96, 214), (40, 232, 255), (255, 160, 40), (255, 255, 255), (176, 255, 64),
        (190, 150, 255), (60, 214, 170), (255, 120, 110), (110, 170, 255), (255, 220, 40),
    )
)  # fmt: skip

Words = Sequence[str]


def draw_record(
    image_rgb: np.ndarray,
    gt_boxes: np.ndarray,
    gt_words: Words,
    pred_boxes: np.ndarray | None = None,
    pred_words: Words = (),
    pred_scores: Sequence[float] | None = None,
    *,
    caption: str = "",
    panel_side: int = PANEL_SIDE,
) -> np.ndarray:
    """Ground truth at the left, predictions at the right, the caption above.

    The same words have the same colour on both sides. Small images are enlarged.

    Args:
        image_rgb: uint8 ``(H, W, 3)``.
        gt_boxes, pred_boxes: ``(N, 4)`` and ``(M, 4)`` XYXY in pixels of ``image_rgb``. Without
            ``pred_boxes`` there is only the ground truth.
        gt_words, pred_words: N and M texts.
        pred_scores: M scores, written behind the words.
        caption: what was asked for, at most three lines of it.
        panel_side: longer side of either half, in pixels.

    Returns:
        uint8 RGB picture.

    Raises:
        ValueError: where the numbers of boxes, words and scores differ.
    """
    gt_boxes = np.asarray(gt_boxes, dtype=np.float64).reshape(-1, 4)
    counts = {len(pred_words), 0 if pred_boxes is None else len(pred_boxes)}
    if pred_scores is not None:
        counts.add(len(pred_scores))
    if len(gt_boxes) != len(gt_words) or len(counts) != 1:
        raise ValueError("Every box needs its words, and every prediction its score.")

    colors = _colors_of([*gt_words, *pred_words])
    scale = panel_side / max(image_rgb.shape[:2])
    panel = _fit(image_rgb, panel_side)
    halves = {
        f"ground truth ({len(gt_boxes)})": _draw_panel(
            panel, gt_boxes * scale, gt_words, None, colors
        )
    }
    if pred_boxes is not None:
        pred_boxes = np.asarray(pred_boxes, dtype=np.float64).reshape(-1, 4)
        scores = None if pred_scores is None else [f"{score:.2f}" for score in pred_scores]
        halves[f"predicted ({len(pred_boxes)})"] = _draw_panel(
            panel, pred_boxes * scale, pred_words, scores, colors
        )
    return _compose(halves, caption)


def draw_found(
    image_rgb: np.ndarray,
    boxes: np.ndarray,
    words: Words,
    scores: Sequence[float],
    *,
    order: Words = (),
    caption: str = "",
    panel_side: int = 2 * PANEL_SIDE,
) -> np.ndarray:
    """Predictions alone, the caption above.

    Args:
        image_rgb: uint8 ``(H, W, 3)``.
        boxes: ``(N, 4)`` XYXY in pixels of ``image_rgb``.
        words, scores: N of each.
        order: all texts that were looked for; gives the same words the same colour in all pictures.
        caption: what was asked for, at most three lines of it.
        panel_side: longer side of the image, in pixels.

    Returns:
        uint8 RGB picture; images of one size give pictures of one size.

    Raises:
        ValueError: where the numbers of boxes, words and scores differ.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if not len(boxes) == len(words) == len(scores):
        raise ValueError("Every box needs its words and its score.")
    colors = _colors_of([*order, *words])
    scale = panel_side / max(image_rgb.shape[:2])
    labels = [f"{score:.2f}" for score in scores]
    panel = _draw_panel(_fit(image_rgb, panel_side), boxes * scale, words, labels, colors)
    return _compose({f"found ({len(boxes)})": panel}, caption)


def contact_sheet(
    images: Sequence[np.ndarray], columns: int = 3, *, cell_width: int = 720
) -> np.ndarray:
    """Pictures of any sizes in rows of ``columns``, each scaled down to ``cell_width``.

    Args:
        images: uint8 RGB, at least one.

    Returns:
        uint8 RGB picture.
    """
    if not images:
        raise ValueError("A contact sheet needs at least one picture.")
    columns = min(columns, len(images))
    cells = []
    for image in images:
        height = max(1, round(image.shape[0] * min(1, cell_width / image.shape[1])))
        width = min(image.shape[1], cell_width)
        cells.append(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    step = max(cell.width for cell in cells) + _MARGIN
    sheet = Image.new(
        "RGB", (columns * step + _MARGIN, sum(heights) + _MARGIN * (len(rows) + 1)), _DESK
    )
    top = _MARGIN
    for row, height in zip(rows, heights):
        for column, cell in enumerate(row):
            sheet.paste(cell, (_MARGIN + column * step, top))
        top += height + _MARGIN
    return np.asarray(sheet)


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write a uint8 RGB picture so that ``path`` never holds half a file."""
    with replacing(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def _colors_of(words: Words) -> dict[str, tuple[float, ...]]:
    """A colour for each text, by the order in which they come first."""
    return {
        text: _PALETTE[index % len(_PALETTE)] for index, text in enumerate(dict.fromkeys(words))
    }


def _fit(image: np.ndarray, side: int) -> np.ndarray:
    """The image with ``side`` as its longer side; a very narrow one gets a margin for labels."""
    scale = side / max(image.shape[:2])
    width, height = (max(1, round(length * scale)) for length in image.shape[1::-1])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    panel = Image.new("RGB", (max(width, side // 2), max(height, side // 4)), _DESK)
    panel.paste(resized, (0, 0))
    return np.asarray(panel)


def _draw_panel(
    image: np.ndarray,
    boxes: np.ndarray,
    words: Words,
    scores: Words | None,
    colors: Mapping[str, tuple[float, ...]],
) -> np.ndarray:
    """The image with its boxes, and with labels that avoid each other."""
    visualizer = Visualizer(image)
    output = visualizer.output
    limits = np.tile([output.width, output.height], 2) - 2
    for box, text in zip(boxes, words):
        visualizer.draw_box(np.clip(box, 2, limits), alpha=1, edge_color=colors[text])
        # A dark rim keeps a line visible on a ground of its own colour.
        line = output.ax.patches[-1]
        line.set_path_effects(
            [patheffects.withStroke(linewidth=line.get_linewidth() + 1.5, foreground="black")]
        )
    renderer = output.canvas.get_renderer()
    placed = np.zeros((0, 4))
    for index, (box, text) in enumerate(zip(boxes, words)):
        lines = textwrap.wrap(text, _LABEL_CHARACTERS, max_lines=2, placeholder=" ...") or [""]
        if scores is not None:
            lines[-1] += f" {scores[index]}"
        visualizer.draw_text(
            "\n".join(lines),
            (0, 0),
            font_size=_LABEL_POINTS,
            color=colors[text],
            horizontal_alignment="left",
        )
        drawn = output.ax.texts[-1]
        extent = drawn.get_window_extent(renderer)
        spot = _label_spot(box, (extent.width + 4, extent.height + 4), image.shape[:2], placed)
        drawn.set_position(tuple(spot[:2] + 2))
        placed = np.concatenate([placed, spot[None]])
    return output.get_image()


def _label_spot(
    box: np.ndarray, size: tuple[float, float], image_size: tuple[int, int], placed: np.ndarray
) -> np.ndarray:
    """Where a label of ``size`` (width, height) covers the least of the others.

    Returns:
        XYXY ``(4,)`` inside of the image: above the box, below it, or inside at a corner.
    """
    width, height = size
    x1, y1, x2, y2 = box
    candidates = np.array(
        [
            (x1, y1 - height),
            (x1, y2),
            (x2 - width, y1 - height),
            (x2 - width, y2),
            (x1, y1),
            (x2 - width, y2 - height),
            (x2, y1),
            (x1 - width, y1),
        ]
    )
    room = np.maximum(np.array([image_size[1] - width, image_size[0] - height]), 0)
    inside = np.clip(candidates, 0, room)
    # Being pushed back into the image moves a label off its place; count that, a little.
    moved = np.abs(inside - candidates).sum(axis=1)
    spots = np.concatenate([inside, inside + [width, height]], axis=1)
    sides = np.minimum(spots[:, None, 2:], placed[None, :, 2:]) - np.maximum(
        spots[:, None, :2], placed[None, :, :2]
    )
    covered = np.prod(np.clip(sides, 0, None), axis=2).sum(axis=1)
    return spots[np.argmin(covered + moved + np.arange(len(spots)))]


def _compose(panels: Mapping[str, np.ndarray], caption: str) -> np.ndarray:
    """Panels of one size side by side on white paper, under the caption and a title each."""
    height, width = next(iter(panels.values())).shape[:2]
    total = len(panels) * (width + _MARGIN) + _MARGIN
    font, title_font = _font(_CAPTION_SIZE), _font(_TITLE_SIZE)
    lines = _wrap(caption, font, total - 2 * _MARGIN, max_lines=3)
    line_height = round(_CAPTION_SIZE * 1.35)
    title_top = _MARGIN + line_height * len(lines)
    top = title_top + round(_TITLE_SIZE * 1.6)
    paper = Image.new("RGB", (total, top + height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(paper)
    for index, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN - 2 + index * line_height), line, fill=_INK, font=font)
    for number, (title, panel) in enumerate(panels.items()):
        x = _MARGIN + number * (width + _MARGIN)
        pen.text((x, title_top), title, fill=_PALE_INK, font=title_font)
        paper.paste(Image.fromarray(panel), (x, top))
    return np.asarray(paper)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """Lines of at most ``width`` pixels (or one word); what does not fit ends in dots."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < max_lines:
            lines.append(word)
        else:
            while " " in lines[-1] and font.getlength(f"{lines[-1]} ...") > width:
                lines[-1] = lines[-1].rpartition(" ")[0]
            lines[-1] += " ..."
            break
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont:
    # The font that matplotlib ships, so that pictures look the same on every machine.
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
