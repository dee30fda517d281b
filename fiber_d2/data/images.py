"""Pixels of a record, wherever they are kept, and the ways in which that can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image, UnidentifiedImageError

from .tsv_file import read_tsv_image


class ImageError(ValueError):
    """A file that is no image, is damaged, or is too large to be one."""


# What is wrong with the image of a record, and not with its annotations.
IMAGE_ERRORS = (FileNotFoundError, ImageError, SizeMismatchError)


def read_image(record: dict[str, Any], image_format: str) -> np.ndarray:
    """The image of a record, ``(H, W, 3)`` uint8.

    Args:
        record: with ``file_name``, an image file or, together with ``tsv_row``, a TSV file whose
            row of that number holds the image.
        image_format: channel order, ``"BGR"`` or ``"RGB"``.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: the file is no image, is damaged, or its header announces more pixels than
            Pillow accepts.
    """
    path, image_id = record["file_name"], record.get("image_id")
    try:
        if "tsv_row" in record:
            return read_tsv_image(record, image_format)
        return utils.read_image(path, format=image_format)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The image {path} (id {image_id!r}) does not exist: check the image folder of the "
            "data set."
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageError(
            f"The image {path} (id {image_id!r}) cannot be read, it is damaged or no image: {error}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"The image {path} (id {image_id!r}) is too large to be read safely: {error} "
            "Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS in a module given to --import."
        ) from error
