"""The generated data set on disk: pictures, COCO, Flickr30k Entities and referring json files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .shapes_expressions import ATTRIBUTE, RELATION, Expression, make_expressions
from .shapes_formats import (
    INFO,
    LICENSES,
    coco_categories,
    entities_files,
    flickr_json,
    mixed_json,
    refexp_json,
    xywh,
)
from .shapes_language import Sentence, make_sentences
from .shapes_lvis import lvis_json
from .shapes_params import ShapesParams, image_id, image_name
from .shapes_render import render_scene
from .shapes_scene import Scene, ShapeObject, make_scene, polygon_area, scene_rng

ENTITIES = "flickr30k_entities"


@dataclass(frozen=True)
class ImageWords:
    """Everything said about one image."""

    sentences: list[Sentence]
    expressions: list[Expression]


def describe(scene: Scene, params: ShapesParams, split: str, index: int) -> ImageWords:
    return ImageWords(
        make_sentences(
            scene, params.sentences_per_image, scene_rng(params, split, index, stream=2)
        ),
        make_expressions(scene, params, scene_rng(params, split, index, stream=3)),
    )


def picture(scene: Scene, params: ShapesParams, split: str, index: int) -> np.ndarray:
    """Pixels of an image, uint8 (H, W, 3), RGB."""
    return render_scene(scene, scene_rng(params, split, index, stream=1))


@dataclass
class SplitWriter:
    """Writes one split below ``root``: call ``add`` per image, then ``finish`` once.

    Attributes:
        classes_of_images: after ``finish``, what the LVIS file of both splits is made from.
    """

    root: Path
    params: ShapesParams
    split: str
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    sentences: list[tuple[int, int, Scene, Sentence]] = field(default_factory=list)
    expressions: list[tuple[int, Scene, Expression]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for folder in self._folders():
            folder.mkdir(parents=True, exist_ok=True)

    def _folders(self) -> list[Path]:
        entities = self.root / ENTITIES
        return [
            self.root / "images" / self.split,
            self.root / "annotations",
            entities / "Annotations",
            entities / "Sentences",
        ]

    def add(self, index: int) -> None:
        """Makes and writes image ``index`` with its Entities files."""
        params, split, number = self.params, self.split, image_id(self.split, index)
        scene = make_scene(params, split, index)
        words = describe(scene, params, split, index)
        image_dir, _, xml_dir, sentence_dir = self._folders()
        options = {"quality": 95, "subsampling": 0} if params.image_format == "jpg" else {}
        pixels = picture(scene, params, split, index)
        Image.fromarray(pixels).save(image_dir / image_name(params, split, index), **options)

        self.images.append(_image_entry(params, split, index) | {"license": 1})
        for shape, visible in zip(scene.objects, scene.visible):
            self._add_annotation(number, shape, visible)
        self.sentences.extend((number, k, scene, s) for k, s in enumerate(words.sentences))
        self.expressions.extend((number, scene, expression) for expression in words.expressions)

        xml, lines = entities_files(scene, words.sentences, number, params.image_format)
        (xml_dir / f"{number}.xml").write_text(xml, encoding="utf-8")
        (sentence_dir / f"{number}.txt").write_text(lines, encoding="utf-8")

    def _add_annotation(self, number: int, shape: ShapeObject, visible: float) -> None:
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": number,
                "category_id": self.params.class_names.index(shape.class_name) + 1,
                "bbox": xywh(shape),
                "area": round(polygon_area(shape.clipped), 2),
                "iscrowd": 0,
                "segmentation": [shape.clipped.round(2).ravel().tolist()],
                "attributes": {
                    "color": shape.color,
                    "shape": shape.shape,
                    "size": shape.size,
                    "texture": shape.texture,
                    "visible": round(visible, 4),
                },
            }
        )

    def finish(self, train: SplitWriter | None = None) -> dict[str, int]:
        """Writes the json files and the list of images; returns how much of what there is.

        Args:
            train: the finished training split, by whose counts LVIS classes are rare or not;
                None to count this one.
        """
        split, params = self.split, self.params
        entities = self.root / ENTITIES
        listing = "".join(f"{image['id']}\n" for image in self.images)
        (entities / f"{split}.txt").write_text(listing, encoding="utf-8")
        coco = {
            "info": INFO,
            "licenses": LICENSES,
            "images": self.images,
            "annotations": self.annotations,
            "categories": coco_categories(params),
        }
        flickr = flickr_json(self.sentences, params)
        kept = self._kept_expressions()
        refexp = refexp_json(kept, params)
        lvis = lvis_json(coco, split, params, None if train is None else train.annotations)
        for name, content in (
            (f"instances_{split}", coco),
            (f"final_flickr_separateGT_{split}", flickr),
            (f"finetune_shapes_{split}", refexp),
            (f"final_mixed_shapes_{split}", mixed_json(self.expressions, params)),
            (f"lvis_{split}", lvis),
        ):
            path = self.root / "annotations" / f"{name}.json"
            path.write_text(json.dumps(content), encoding="utf-8")
        groups = [expression.group for _, _, expression in kept]
        return {
            "images": len(self.images),
            "objects": len(self.annotations),
            "sentences": len(self.sentences),
            "phrases": sum(len(im["tokens_positive_eval"]) for im in flickr["images"]),
            ATTRIBUTE: groups.count(ATTRIBUTE),
            RELATION: groups.count(RELATION),
        }

    def _kept_expressions(self) -> list[tuple[int, Scene, Expression]]:
        share = self.params.train_relation_share
        if self.split != "train" or share is None:
            return self.expressions
        return thin_to_share(self.expressions, share, self.params.seed)


def thin_to_share(
    expressions: list[tuple[int, Scene, Expression]], share: float, seed: int
) -> list[tuple[int, Scene, Expression]]:
    """Leaves out expressions of the group in excess, at random, keeping the order.

    What is left has relational expressions in the given share, as far as whole numbers allow.
    """
    places: dict[str, list[int]] = {ATTRIBUTE: [], RELATION: []}
    for place, (_, _, expression) in enumerate(expressions):
        places[expression.group].append(place)
    most = {
        RELATION: len(places[ATTRIBUTE]) * share / (1 - share) if share < 1 else np.inf,
        ATTRIBUTE: len(places[RELATION]) * (1 - share) / share if share > 0 else np.inf,
    }
    rng = np.random.default_rng([seed, 99])
    kept: set[int] = set()
    for group, found in places.items():
        order = rng.permutation(found)
        kept.update(int(p) for p in order[: int(min(len(found), round_down(most[group])))])
    return [item for place, item in enumerate(expressions) if place in kept]


def round_down(value: float) -> float:
    return value if np.isinf(value) else int(value + 1e-9)


def _image_entry(params: ShapesParams, split: str, index: int) -> dict[str, Any]:
    return {
        "id": image_id(split, index),
        "file_name": image_name(params, split, index),
        "height": params.image_size,
        "width": params.image_size,
    }


def all_captions(params: ShapesParams, split: str, count: int) -> Iterator[str]:
    """Captions of the first images of a split, without drawing anything."""
    for index in range(count):
        words = describe(make_scene(params, split, index), params, split, index)
        yield from (sentence.text for sentence in words.sentences)
        yield from (expression.text for expression in words.expressions)
