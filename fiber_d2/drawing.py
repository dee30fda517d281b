"""Pictures put together: two halves under a caption, predictions alone, sheets of pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fiber_d2.colors import WordColors
from fiber_d2.files import replacing
from fiber_d2.labels import draw_boxes, font, letter_size, line_height, wrap

PANEL_SIDE = 448  # pixels of the longer side of either half of a picture
_MARGIN = 10
_INK, _PALE_INK, _PAPER, _DESK = (25, 25, 25), (110, 110, 110), (255, 255, 255), (214, 214, 214)

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
    panel_side: int | None = PANEL_SIDE,
    colors: WordColors | None = None,
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
        panel_side: longer side of either half, in pixels; None for the image's own,
            if that is not too short for labels.
        colors: of words that appear in other pictures, too.

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

    chosen = (colors or WordColors()).of([*gt_words, *pred_words])
    side = panel_side or max(*image_rgb.shape[:2], PANEL_SIDE)
    scale = side / max(image_rgb.shape[:2])
    panel = fit_panel(image_rgb, side)
    none = [""] * len(gt_boxes)
    truth = draw_boxes(panel, gt_boxes * scale, gt_words, none, chosen)
    halves = [(f"ground truth ({len(gt_boxes)})", truth)]
    if pred_boxes is not None:
        pred_boxes = np.asarray(pred_boxes, dtype=np.float64).reshape(-1, 4)
        notes = [""] * len(pred_boxes)
        if pred_scores is not None:
            notes = [f"{score:.2f}" for score in pred_scores]
        found = draw_boxes(panel, pred_boxes * scale, pred_words, notes, chosen)
        halves.append((f"predicted ({len(pred_boxes)})", found))
    return compose(halves, caption)


def draw_found(
    image_rgb: np.ndarray,
    boxes: np.ndarray,
    words: Words,
    scores: Sequence[float],
    *,
    order: Words = (),
    caption: str = "",
    panel_side: int | None = 2 * PANEL_SIDE,
) -> np.ndarray:
    """Predictions alone, the caption above.

    Args:
        image_rgb: uint8 ``(H, W, 3)``.
        boxes: ``(N, 4)`` XYXY in pixels of ``image_rgb``.
        words, scores: N of each.
        order: all texts that were looked for; gives the same words the same colour in all pictures.
        caption: what was asked for, at most three lines of it.
        panel_side: longer side of the image, in pixels; None for its own, if that is not too short
            for labels.

    Returns:
        uint8 RGB picture; images of one size give pictures of one size.

    Raises:
        ValueError: where the numbers of boxes, words and scores differ.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if not len(boxes) == len(words) == len(scores):
        raise ValueError("Every box needs its words and its score.")
    colors = WordColors([order]).of(words)
    side = panel_side or max(*image_rgb.shape[:2], PANEL_SIDE)
    scale = side / max(image_rgb.shape[:2])
    notes = [f"{score:.2f}" for score in scores]
    panel = draw_boxes(fit_panel(image_rgb, side), boxes * scale, words, notes, colors)
    return compose([(f"found ({len(boxes)})", panel)], caption)


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


def fit_panel(image: np.ndarray, side: int) -> np.ndarray:
    """The image with ``side`` as its longer side; a very narrow one gets a margin for labels."""
    scale = side / max(image.shape[:2])
    width, height = (max(1, round(length * scale)) for length in image.shape[1::-1])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    panel = Image.new("RGB", (max(width, side // 2), max(height, side // 4)), _DESK)
    panel.paste(resized, (0, 0))
    return np.asarray(panel)


def compose(
    panels: Sequence[tuple[str, np.ndarray]], caption: str, *, columns: int = 0
) -> np.ndarray:
    """Panels of one size on white paper, with a title each, under the caption.

    Args:
        panels: title and uint8 RGB of each, at least one.
        caption: at most three lines of it.
        columns: panels of a row; 0 puts all in one.
    """
    height, width = panels[0][1].shape[:2]
    columns = min(columns or len(panels), len(panels))
    total = columns * (width + _MARGIN) + _MARGIN
    letters = letter_size(max(height, width))
    caption_letters, title_letters = round(1.4 * letters), round(1.1 * letters)
    lines = wrap(caption, caption_letters, total - 2 * _MARGIN, max_lines=3)
    step = line_height(caption_letters)
    title_height = line_height(title_letters) + 2
    rows = -(-len(panels) // columns)
    top = _MARGIN + step * len(lines)
    row_height = title_height + height + _MARGIN
    paper = Image.new("RGB", (total, top + rows * row_height), _PAPER)
    pen = ImageDraw.Draw(paper)
    for index, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN - 2 + index * step), line, fill=_INK, font=font(caption_letters))
    for number, (title, panel) in enumerate(panels):
        x = _MARGIN + number % columns * (width + _MARGIN)
        y = top + number // columns * row_height
        (text,) = wrap(title, title_letters, width, max_lines=1) or [""]
        pen.text((x, y), text, fill=_PALE_INK, font=font(title_letters))
        paper.paste(Image.fromarray(panel), (x, y + title_height))
    return np.asarray(paper)
