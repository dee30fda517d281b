"""Pixels of a record, wherever they are kept, and the ways in which that can fail."""

from __future__ import annotations

import os
from typing import Any, Union

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image, ImageOps, UnidentifiedImageError

from .tsv_file import read_tsv_image

ImageLike = Union[str, "os.PathLike[str]", Image.Image, np.ndarray, torch.Tensor]
_CHANNEL_ORDERS = ("BGR", "RGB")


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


def read_pixels(image: ImageLike, image_format: str, *, given_format: str = "BGR") -> np.ndarray:
    """The pixels of an image in whatever form, as a data set's mapper would read them.

    Args:
        image: path; PIL image; uint8 array ``(H, W, 3)`` or ``(H, W)``; uint8 tensor ``(3, H, W)``.
        image_format: channel order of the result.
        given_format: channel order of an array or tensor.

    Returns:
        uint8 ``(H, W, 3)``.

    Raises:
        FileNotFoundError, ValueError: there is no such image, or it is of another form.
    """
    if given_format not in _CHANNEL_ORDERS:
        raise ValueError(f"image_format is {given_format!r}; it must be 'BGR' or 'RGB'.")
    if isinstance(image, (str, os.PathLike)):
        return read_image({"file_name": os.fspath(image)}, image_format)
    if isinstance(image, Image.Image):
        return utils.convert_PIL_to_numpy(ImageOps.exif_transpose(image), image_format)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"A tensor of shape {tuple(image.shape)} is no image: it has to be (3, H, W)."
            )
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"An image of the type {type(image).__name__} is not known: give a path, a PIL image, "
            "an array, a tensor, or a list of these."
        )
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            f"An array of shape {image.shape} is no image: it has to be (H, W, 3) or (H, W)."
        )
    if image.dtype != np.uint8:
        raise ValueError(
            f"The numbers of an image are uint8 from 0 to 255, not {image.dtype}: convert them, "
            "such as by (image * 255).round().astype('uint8') where they are from 0 to 1."
        )
    return image if given_format == image_format else np.ascontiguousarray(image[:, :, ::-1])
