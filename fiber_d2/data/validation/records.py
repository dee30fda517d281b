"""Records of a data set that has no json file, in the form of the json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.structures import BoxMode

from fiber_d2.data.builtin import DETECTION

from .checks import Finding
from .schema import check_category, check_count, check_image_keys, unused_classes
from .sources import Contents, Item, Source
from .values import as_box, is_id, show

# Read lazily; whatever a damaged file makes of that must not end the validation.
_RECORD_ERRORS = (ValueError, KeyError, IndexError, TypeError, OSError)


class _RecordItems:
    """Records in the form of the json, made anew at each iteration: they may be lazy and many.

    A record that cannot be read, or has no id, is left out.
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self.records = records

    def __iter__(self) -> Iterator[Item]:
        for index in range(len(self.records)):
            item = self.read(index)
            if isinstance(item, Item):
                yield item

    def read(self, index: int) -> Item | str:
        """One item, or why there is none."""
        try:
            record = self.records[index]
            image = {key: value for key, value in record.items() if key != "annotations"}
            image["id"] = image.pop("image_id")
            if not is_id(image["id"]):
                return f"the image_id is {show(image['id'])}"
            annotations = [_json_annotation(a) for a in record.get("annotations") or ()]
        except KeyError as error:
            return f"it lacks {error}"
        except _RECORD_ERRORS as error:
            return str(error)
        return Item(image, annotations)


def _json_annotation(annotation: dict[str, Any]) -> dict[str, Any]:
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if hasattr(box, "tolist"):
        box = box.tolist()
    numbers = as_box(box)
    if numbers is not None and mode == BoxMode.XYXY_ABS:
        x1, y1, x2, y2 = numbers
        box = [x1, y1, x2 - x1, y2 - y1]
    elif mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        box = f"{box} in the mode {mode}"  # reported as no box
    return {**annotation, "bbox": box}


def read_record_contents(source: Source) -> Contents:
    """Take records apart, as :func:`~.schema.read_json_contents` does with a file."""
    items = _RecordItems(source.records)
    contents = Contents(
        items=items,
        num_images=len(source.records),
        classes=list(enumerate(source.class_names)),
    )
    contents.findings.extend(_examine_records(items, contents, source))
    return contents


def _examine_records(items: _RecordItems, contents: Contents, source: Source) -> Iterator[Finding]:
    detection, known = source.kind == DETECTION, range(len(contents.classes))
    seen: dict[Any, tuple[int, Any]] = {}
    used: set[Any] = set()
    if detection and not contents.classes:
        yield Finding("no-categories", "the metadata name no classes: set thing_classes")
    # One pass for all: reading the records may be slow.
    for index in range(contents.num_images):
        item = items.read(index)
        if not isinstance(item, Item):
            yield Finding("image-entry", f"record {index}: {item}")
            continue
        contents.images.append(item.image)
        contents.num_annotations += len(item.annotations)
        image_id, row = item.image["id"], item.image.get("tsv_row")
        first, first_row = seen.setdefault(image_id, (index, row))
        # A row of a TSV may be shown repeatedly.
        if first != index and (row is None or row != first_row):
            yield Finding("image-id-repeated", f"records {first} and {index}", image_id=image_id)
        yield from check_image_keys(item.image, source)
        yield from check_count(item, source.kind)
        if detection:
            yield from check_category(item, known, used)
    if not seen:
        yield Finding("no-images", "there is no usable record")
    if detection:
        yield from unused_classes(contents, used)
