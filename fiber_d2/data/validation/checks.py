"""The checks as a table, and what one of them has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

ERROR, WARNING, INFO = "error", "warning", "info"
LEVELS = (ERROR, WARNING, INFO)


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        level: "error": training or evaluation fails or is wrong; "warning": look at it; "info".
        about: what is found, in a few words.
        fixable: whether :func:`~fiber_d2.data.validation.repair` removes every such error (those
            of image files only where the images have been read).
    """

    level: str
    about: str
    fixable: bool = False


CHECKS: dict[str, Check] = {
    # The file and its entries.
    "json": Check(ERROR, "not readable as json, or as a data set"),
    "lists": Check(ERROR, "lists that the format needs are absent"),
    "no-images": Check(ERROR, "no image at all"),
    "no-categories": Check(ERROR, "no class at all"),
    "image-entry": Check(ERROR, "image entries that lack a key or have one of a wrong type"),
    "image-size-entry": Check(ERROR, "images whose width or height is no size", fixable=True),
    "category-entry": Check(ERROR, "categories that lack a key or have one of a wrong type"),
    "annotation-entry": Check(ERROR, "annotations without an image", fixable=True),
    "image-id-repeated": Check(ERROR, "several images of one id"),
    "image-ids-mixed": Check(ERROR, "image ids partly numbers and partly text"),
    "annotation-id-missing": Check(ERROR, "annotations without a usable id", fixable=True),
    "annotation-id-repeated": Check(ERROR, "several annotations of one id", fixable=True),
    "unknown-image": Check(ERROR, "annotations of an image that is not listed", fixable=True),
    "unknown-category": Check(ERROR, "annotations of a class that is not listed", fixable=True),
    "category-id-repeated": Check(ERROR, "several categories of one id"),
    "category-name-repeated": Check(WARNING, "several categories of one name"),
    "category-background": Check(WARNING, "a category called background", fixable=True),
    "category-unused": Check(INFO, "categories without an annotation"),
    "image-without-annotations": Check(INFO, "images without an annotation"),
    "expression-boxes": Check(ERROR, "referring expressions that have not exactly one box"),
    # Boxes.
    "box-entry": Check(ERROR, "boxes that are not four finite numbers", fixable=True),
    "box-empty": Check(ERROR, "boxes of no or negative extent", fixable=True),
    "box-outside": Check(ERROR, "boxes wholly outside of their image", fixable=True),
    "box-beyond": Check(WARNING, "boxes more than a pixel beyond their image", fixable=True),
    "box-crowd": Check(INFO, "crowds: not learned from"),
    "box-area": Check(INFO, "areas that do not fit their box"),
    # Image files.
    "image-path": Check(ERROR, "file names that lead out of the image folder", fixable=True),
    "image-missing": Check(ERROR, "image files that do not exist", fixable=True),
    "image-unreadable": Check(ERROR, "image files that are damaged or no images", fixable=True),
    "image-bomb": Check(ERROR, "images too large to be opened", fixable=True),
    "image-size": Check(ERROR, "images of another size than recorded", fixable=True),
    "image-rotated-size": Check(ERROR, "sizes, and so boxes, of before the EXIF rotation"),
    "image-rotated": Check(WARNING, "images that EXIF data rotate or mirror when read"),
    "image-huge": Check(WARNING, "very large images"),
    "duplicate-file": Check(WARNING, "image files that another split uses too"),
    "duplicate-content": Check(WARNING, "copies of image files of another split"),
    # Captions and classes.
    "caption-entry": Check(ERROR, "captions that are missing, blank or no text"),
    "caption-long": Check(ERROR, "captions of more tokens than allowed"),
    "span-entry": Check(ERROR, "phrases that are no list of [begin, end) pairs"),
    "span-range": Check(ERROR, "spans that reach out of their caption", fixable=True),
    "span-reversed": Check(ERROR, "spans that end before they begin", fixable=True),
    "span-empty": Check(ERROR, "spans of no character", fixable=True),
    "span-no-token": Check(ERROR, "phrases that meet no token"),
    "span-cut": Check(ERROR, "phrases that the token limit cuts off"),
    "span-none": Check(WARNING, "boxes or phrases that are tied to no word"),
    "class-no-token": Check(ERROR, "classes without a token of their own"),
    "class-long": Check(ERROR, "classes that exceed the token limit alone"),
    "class-alike": Check(WARNING, "classes that read alike in the caption"),
    "class-captions": Check(INFO, "captions that the classes need"),
}  # fmt: skip


class Finding(NamedTuple):
    """One offender of one check.

    Attributes:
        check: key of ``CHECKS``.
        message: what is wrong, with the values at fault.
        image_id, annotation_id, file_name: where, as far as known.
        caption: the caption at fault with its spans in brackets.
        source: label of the data set.
    """

    check: str
    message: str
    image_id: Any = None
    annotation_id: Any = None
    file_name: str | None = None
    caption: str | None = None
    source: str = ""

    @property
    def level(self) -> str:
        return CHECKS[self.check].level
