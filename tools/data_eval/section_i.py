"""TSV files: rows, images, boxes, classes and line lists

SPEC_DATA_EVAL section 5.8, ``i_tsv/``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fiber_d2.data.tsv import TSVRecords, clip_inclusive, load_tsv_dataset, read_tsv_image

from .common import Section, read_json

FOLDER = "i_tsv"
# Boxes are float32 in the original.
TOLERANCE = 1e-5


def check(directory: Path) -> Section:
    section = Section("i")
    folder = Path(directory) / FOLDER
    for name, expected in read_json(folder, "expected.json").items():
        with section.case(name):
            records = load_tsv_dataset(str(folder / name))
            section.equal("length", len(records), expected["length"])
            numbered = zip(records.label_numbers.tolist(), records.class_names)
            background = [[0, "__background__"]]
            section.equal("classes", [*background, *numbered], sorted(expected["ind_to_class"]))
            sizes = records.image_sizes()
            for item in expected["items"]:
                with section.case(f"item {item['index']}"):
                    _check_item(section, records, sizes, item)
    return section


def _check_item(section: Section, records: TSVRecords, sizes: np.ndarray, item: dict) -> None:
    index, (width, height) = item["index"], item["image_wh"]
    record = records[index]
    section.equal("line", records.row(index), item["line"])
    section.equal("key", records.key(index), item["key"])
    section.equal("image id", record["image_id"], item["int_image_id"])
    section.equal("size", {key: record[key] for key in ("height", "width")}, dict(item["img_info"]))
    section.equal("sizes of all", sizes[index], [record["height"], record["width"]])
    image = np.ascontiguousarray(read_tsv_image(record, "RGB"))
    section.equal("image size", image.shape, [height, width, 3])
    section.equal("pixels", hashlib.sha1(image.tobytes()).hexdigest(), item["rgb_sha1"])
    # The original's corners are inclusive, and its labels the numbers of the label map.
    rects, categories = records.objects(index)
    expected = np.array(item["boxes_clipped_keep_empty"], dtype=float).reshape(-1, 4)
    boxes, kept = clip_inclusive(rects, height, width)
    section.close("boxes, inclusive", boxes, expected, TOLERANCE)
    numbers = np.append(records.label_numbers, 0)[categories]  # -1 is the background
    section.equal("labels", numbers, item["labels"])
    section.equal("boxes that are not empty", int(kept.sum()), item["n_after_remove_empty"])
    # A record has the same boxes without the empty ones and the background, with plain corners.
    kept &= categories >= 0
    found = [annotation["bbox"] for annotation in record["annotations"]]
    plain = expected[kept] + [0, 0, 1, 1]
    section.close("boxes of the record", np.reshape(found, (-1, 4)), plain, TOLERANCE)
    found = [annotation["category_id"] for annotation in record["annotations"]]
    section.equal("categories of the record", found, categories[kept])
