"""Files of strangers: what is read, and what is said of the rest."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fiber_d2.data.images import read_pixels
from fiber_d2.demo.uploads import FORMATS, UploadError, decode, open_upload

PIXELS = 10_000


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(size=(40, 30), mode="RGB", seed=0):
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else size[::-1]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def png_header(width, height, bit_depth=8):
    """A PNG that announces a size, with hardly anything behind it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bit_depth, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def animation(kind):
    frames = [picture(seed=number) for number in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def read(data):
    return decode(open_upload(data, max_pixels=PIXELS))


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_are_read_as_files_are(kind, tmp_path):
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(encoded(picture(), kind))
    image = read(path.read_bytes())
    assert image.mode == "RGB"
    assert (np.asarray(image)[:, :, ::-1] == read_pixels(path, "BGR")).all()


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "LA", "CMYK", "I;16"])
def test_all_modes_become_rgb(mode):
    image = picture().convert("L").convert("I;16") if mode == "I;16" else picture().convert(mode)
    assert read(encoded(image, "JPEG" if mode == "CMYK" else "PNG")).mode == "RGB"


def test_pictures_are_turned_as_they_say():
    upright = picture()
    exif = upright.getexif()
    exif[0x0112] = 6
    turned = read(encoded(upright, exif=exif))
    assert turned.size == (30, 40)
    assert (np.asarray(turned) == np.rot90(np.asarray(upright), -1)).all()


SVG = (
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/etc/passwd) run\n"


@pytest.mark.parametrize(
    "data, status, message",
    [
        (b"", 400, "empty"),
        (b"no picture at all", 415, "no picture of a kind"),
        (SVG, 415, "JPEG, PNG, WEBP, GIF or BMP"),
        (EPS, 415, "no picture of a kind"),
        (encoded(picture(), "TIFF"), 415, "no picture of a kind"),
        (encoded(picture(), "PPM"), 415, "no picture of a kind"),
        (animation("GIF"), 415, "animated"),
        (animation("PNG"), 415, "animated"),
        (animation("WEBP"), 415, "animated"),
        (encoded(picture((101, 100))), 413, "101 x 100 pixels, and 0.01 megapixels"),
        # A decompression bomb in a few bytes, for us and for Pillow.
        (png_header(20_000, 4_000), 413, "20000 x 4000 pixels"),
        (png_header(60_000, 60_000), 413, "too many pixels"),
        (encoded(picture((60, 1))), 422, "50 times as long"),
        (encoded(picture((90, 90)), "JPEG")[:-400], 422, "damaged"),
        (encoded(picture())[:-200], 422, "damaged"),
        (png_header(40, 30), 422, "damaged"),
        (encoded(picture(), "JPEG")[:40], 422, "damaged"),
    ],
    ids=lambda value: "file" if isinstance(value, bytes) else str(value)[:20],
)
def test_what_cannot_be_used_has_one_message(data, status, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UploadError, match=message) as caught:
            read(data)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


BASES = [encoded(picture(), kind) for kind in FORMATS] + [animation("GIF"), animation("WEBP")]


@settings(max_examples=60, deadline=None)
@given(base=st.sampled_from(BASES), data=st.data())
def test_damage_of_any_kind_is_told_and_nothing_else_happens(base, data):
    damaged = bytearray(base)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(base) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert read(bytes(damaged[: data.draw(st.integers(0, len(base)))])).mode == "RGB"
    except UploadError:
        pass
