"""Pictures of samples: the boxes with the words they are tied to."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import BoxMode

from fiber_d2.data.builtin import DETECTION
from fiber_d2.data.images import IMAGE_ERRORS, read_image

from .captions import spans_of
from .image_files import ImageTask, locate
from .sources import Contents, Item, Source
from .values import as_box, as_spans, is_id, is_text


def draw_samples(
    source: Source, contents: Contents, count: int, output_dir: str | os.PathLike[str]
) -> list[Path]:
    """Draw the ground truth of some images, evenly spread over the data set.

    Images that cannot be read are passed over, as are faulty boxes and spans. Preferred are
    images with boxes.

    Args:
        count: number of pictures.
        output_dir: gets ``NNN_<image id>.png`` and ``contact_sheet.png``.

    Returns:
        the paths, the contact sheet last; none where no image can be read.
    """
    # Drawing needs matplotlib, which validation does not.
    from fiber_d2.visualization import (
        WordColors,
        contact_sheet,
        draw_record,
        ground_truth_of,
        save_png,
    )

    class_ids = {class_id: index for index, (class_id, _) in enumerate(contents.classes)}
    metadata = Metadata(
        name=source.label,
        ground_truth=source.kind,
        thing_classes=[name for _, name in contents.classes],
    )
    drawable: Sequence[int] = ()
    if source.records is None:  # records are slow to read
        drawable = [index for index, item in enumerate(contents.items) if item.annotations]
    samples: list[tuple[str, np.ndarray, np.ndarray, list[str], str]] = []
    for item in _spread(contents, drawable or range(len(contents.images)), count):
        task = locate(item.image, source)
        if not isinstance(task, ImageTask):
            continue
        try:
            image = read_image(task.record or {"file_name": task.path}, "RGB")
        except IMAGE_ERRORS:  # reported by the checks, where these were to look at images
            continue
        boxes, words = ground_truth_of(_drawable_record(item, source.kind, class_ids), metadata)
        caption = item.image["caption"] if is_text(item.image.get("caption")) else ""
        name = re.sub(r"[^\w.-]+", "_", str(item.image["id"]))[:100]
        samples.append((f"{len(samples):03d}_{name}.png", image, boxes, words, caption))
    if not samples:
        return []
    colors = WordColors(words for *_, words, _ in samples)
    pictures = [
        (name, draw_record(image, boxes, words, caption=caption, colors=colors))
        for name, image, boxes, words, caption in samples
    ]
    paths = [Path(output_dir) / name for name, _ in pictures]
    for path, (_, picture) in zip(paths, pictures):
        save_png(path, picture)
    paths.append(Path(output_dir) / "contact_sheet.png")
    save_png(paths[-1], contact_sheet([picture for _, picture in pictures]))
    return paths


def _spread(contents: Contents, indices: Sequence[int], count: int) -> list[Item]:
    count = min(count, len(indices))
    wanted = {indices[i * len(indices) // count] for i in range(count)}
    return [item for index, item in enumerate(contents.items) if index in wanted]


def _drawable_record(item: Item, kind: str, class_ids: dict[Any, int]) -> dict[str, Any]:
    """A record of what is sound of an item."""
    record = {key: value for key, value in item.image.items() if key == "caption"}
    annotations = []
    for annotation in item.annotations:
        box = as_box(annotation.get("bbox"))
        if box is None or box[2] <= 0 or box[3] <= 0:
            continue
        drawn = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": annotation.get("iscrowd")}
        if kind == DETECTION:
            category_id = annotation.get("category_id")
            if not is_id(category_id) or category_id not in class_ids:
                continue
            drawn["category_id"] = class_ids[category_id]
        else:
            if not is_text(record.get("caption")):
                continue
            drawn["tokens_positive"] = as_spans(spans_of(annotation)) or []
        annotations.append(drawn)
    phrases = item.image.get("tokens_positive_eval")
    if isinstance(phrases, list) and all(as_spans(phrase) is not None for phrase in phrases):
        record["tokens_positive_eval"] = phrases
    return {**record, "annotations": annotations}
