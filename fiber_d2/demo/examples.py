"""Pictures to begin with: scenes of the generated data set, or those of a folder."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fiber_d2.data.shapes_params import ShapesParams
from fiber_d2.data.shapes_scene import make_scene
from fiber_d2.data.shapes_write import describe, picture
from fiber_d2.demo.uploads import UploadError, decode, open_upload

MOST = 12
# As the quickstart's validation images, which its model was not trained on, but larger.
_SHAPES = ShapesParams(
    image_size=256,
    shapes=("circle", "triangle", "cross"),
    small=(0.16, 0.23),
    large=(0.32, 0.45),
    sentences_per_image=8,
    relations_per_image=12,
)
# Scenes whose sentences a quickstart's model was seen to answer well.
_SHAPES_SHOWN = (22, 7, 14)


@dataclass(frozen=True)
class Example:
    """
    Attributes:
        name: for whoever does not see it.
        png: the file.
        texts: for kinds of questions, something to ask.
    """

    name: str
    png: bytes
    texts: dict[str, str]


def generated_examples() -> list[Example]:
    """Scenes that the quickstart's model knows the words for."""
    examples = []
    for index in _SHAPES_SHOWN:
        scene = make_scene(_SHAPES, "val", index)
        words = describe(scene, _SHAPES, "val", index)
        # A sentence that names some things, not all of them, in few words.
        sentence = min(
            words.sentences,
            key=lambda one: (abs(sum(bool(p.objects) for p in one.phrases) - 2), len(one.text)),
        )
        expression = min(words.expressions, key=lambda one: (one.reference is None, len(one.text)))
        texts = {
            "classes": ". ".join(sorted({shape.class_name for shape in scene.objects})),
            "caption": sentence.text,
            "expression": expression.text,
        }
        image = Image.fromarray(picture(scene, _SHAPES, "val", index))
        examples.append(Example(f"shapes, scene {index}", _png(image), texts))
    return examples


def folder_examples(folder: str | os.PathLike[str], *, max_pixels: int) -> list[Example]:
    """The first pictures of a folder, read once; other files are passed over.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--examples {os.fspath(folder)} is not a folder.")
    examples: list[Example] = []
    for path in sorted(Path(folder).iterdir()):
        if len(examples) == MOST:
            break
        if not path.is_file():
            continue
        try:
            image = decode(open_upload(path.read_bytes(), max_pixels=max_pixels))
        except UploadError:
            continue  # a label file, a text
        image.thumbnail((1600, 1600))
        examples.append(Example(path.stem, _png(image), {}))
    if not examples:
        raise FileNotFoundError(f"--examples {os.fspath(folder)} holds no picture.")
    return examples


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
