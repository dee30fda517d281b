"""Pictures of strangers: looked at before they are decoded, and never trusted."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

from PIL import Image, ImageOps, UnidentifiedImageError

# What every browser shows. Pillow knows more, some of which start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Beyond it the shorter side of what a model is shown would have hardly any pixel.
LONGEST_STRIP = 50
# All that Pillow's decoders were seen to raise over damaged files.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error,
)  # fmt: skip


class UploadError(ValueError):
    """A picture that cannot be used; the message is for the one who sent it.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def open_upload(data: bytes, *, max_pixels: int) -> Image.Image:
    """Read the header of a picture; its pixels are not decoded yet.

    Args:
        data: the file.
        max_pixels: width times height, at most.

    Raises:
        UploadError: no picture, one of another kind, an animated or a too large one.
    """
    if not data:
        raise UploadError("The file is empty.", 400)
    try:
        with warnings.catch_warnings():
            # What it warns of is decided here, by max_pixels.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(max_pixels) from error
    except UnidentifiedImageError as error:
        *most, last = FORMATS
        raise UploadError(
            f"The file is no picture of a kind that is read here: {', '.join(most)} or {last}.", 415
        ) from error
    except _DAMAGE as error:
        raise _damaged(error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise _too_many_pixels(max_pixels, image.size)
    if max(width, height) > LONGEST_STRIP * min(width, height):
        raise UploadError(
            f"The picture is {width} x {height} pixels: no side may be more than {LONGEST_STRIP} "
            "times as long as the other.",
            422,
        )
    try:
        # The second frame of an MPO, as phones make them, is another view of the first.
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except _DAMAGE as error:
        raise _damaged(error) from error
    if animated:
        raise UploadError("The picture is animated: send one frame of it.", 415)
    return image


def decode(image: Image.Image) -> Image.Image:
    """The pixels of an opened picture, RGB, turned as the file says.

    Raises:
        UploadError: the file is damaged.
    """
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, *_DAMAGE) as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> UploadError:
    return UploadError(f"The picture is damaged and cannot be decoded ({error}).", 422)


def _too_many_pixels(limit: int, size: tuple[int, int] | None = None) -> UploadError:
    found = f"is {size[0]} x {size[1]} pixels" if size else "has too many pixels"
    return UploadError(
        f"The picture {found}, and {limit / 1e6:g} megapixels are the limit: scale it down.", 413
    )
