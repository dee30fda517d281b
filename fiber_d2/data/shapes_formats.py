"""Annotations of generated scenes in the formats of COCO, MDETR and Flickr30k Entities."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .shapes_expressions import Expression
from .shapes_language import Phrase, Sentence
from .shapes_params import ShapesParams
from .shapes_scene import Scene, ShapeObject

INFO = {"description": "Generated shapes", "version": "1", "year": 2024, "contributor": "fiber_d2"}
LICENSES = [{"id": 1, "name": "CC0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]
GROUNDING_CATEGORIES = [{"id": 1, "name": "object", "supercategory": "object"}]


def xywh(shape: ShapeObject) -> list[float]:
    """The box of a json annotation: x, y, width, height to a hundredth of a pixel."""
    x1, y1, x2, y2 = (round(v, 2) for v in shape.box)
    return [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]


def integer_box(shape: ShapeObject) -> tuple[int, int, int, int]:
    """The box of an Entities file: whole pixels, XYXY."""
    x1, y1, x2, y2 = (int(round(v)) for v in shape.box)
    return x1, y1, x2, y2


def coco_categories(params: ShapesParams) -> list[dict[str, Any]]:
    return [
        {"id": i + 1, "name": name, "supercategory": name.split(" ")[1]}
        for i, name in enumerate(params.class_names)
    ]


def _caption_entry(number: int, params: ShapesParams, text: str) -> dict[str, Any]:
    return {
        "file_name": f"{number}.{params.image_format}",
        "height": params.image_size,
        "width": params.image_size,
        "caption": text,
        "tokens_negative": [[0, len(text)]],
    }


def entities_of(sentences: list[Sentence], number: int) -> dict[tuple[Any, ...], int]:
    """Entity id of every group of objects and every scene phrase that the sentences name.

    Ids are unique over the data set; 0 is what Flickr30k Entities gives to what is not visual.
    """
    ids: dict[tuple[Any, ...], int] = {}
    for sentence in sentences:
        for phrase in sentence.phrases:
            ids.setdefault(entity_key(phrase), number * 100 + len(ids) + 1)
            if phrase.types == ("notvisual",):
                ids[entity_key(phrase)] = 0
    return ids


def entity_key(phrase: Phrase) -> tuple[Any, ...]:
    return tuple(sorted(phrase.objects)) or phrase.types


def entities_files(
    scene: Scene, sentences: list[Sentence], number: int, image_format: str
) -> tuple[str, str]:
    """Contents of ``Annotations/<id>.xml`` and ``Sentences/<id>.txt`` of an image."""
    ids = entities_of(sentences, number)
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{number}.{image_format}"
    size = ElementTree.SubElement(root, "size")
    for name, value in (("width", scene.size), ("height", scene.size), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(value)
    for key, entity in ids.items():
        if key == ("scene",):
            element = ElementTree.SubElement(root, "object")
            for name, value in (("name", entity), ("scene", 1), ("nobndbox", 1)):
                ElementTree.SubElement(element, name).text = str(value)
    for place, shape in enumerate(scene.objects):
        names = [entity for key, entity in ids.items() if place in key]
        if not names:
            continue
        element = ElementTree.SubElement(root, "object")
        for entity in names:
            ElementTree.SubElement(element, "name").text = str(entity)
        box = ElementTree.SubElement(element, "bndbox")
        corners = zip(("xmin", "ymin", "xmax", "ymax"), integer_box(shape))
        for name, value in corners:
            ElementTree.SubElement(box, name).text = str(value)
    ElementTree.indent(root)
    xml = ElementTree.tostring(root, encoding="unicode") + "\n"
    lines = "".join(f"{_bracketed(sentence, ids)}\n" for sentence in sentences)
    return xml, lines


def _bracketed(sentence: Sentence, ids: dict[tuple[Any, ...], int]) -> str:
    words = list(sentence.words)
    for phrase in sentence.phrases:
        entity = ids[entity_key(phrase)]
        head = f"[/EN#{entity}/{'/'.join(phrase.types)} "
        words[phrase.first] = head + words[phrase.first]
        words[phrase.last - 1] += "]"
    return " ".join(words)


def flickr_json(
    sentences: list[tuple[int, int, Scene, Sentence]], params: ShapesParams
) -> dict[str, Any]:
    """MDETR-style grounding json: one "image" per sentence, one annotation per box."""
    images, annotations = [], []
    for number, sentence_id, scene, sentence in sentences:
        seen = [phrase for phrase in sentence.phrases if phrase.objects]
        spans = [list(sentence.char_span(phrase)) for phrase in seen]
        images.append(
            _caption_entry(number, params, sentence.text)
            | {
                "id": len(images) + 1,
                "dataset_name": "flickr",
                "original_img_id": number,
                "sentence_id": sentence_id,
                "tokens_positive_eval": [[span] for span in spans],
            }
        )
        for place, shape in enumerate(scene.objects):
            own = [span for p, span in zip(seen, spans) if place in p.objects]
            if own:
                x1, y1, x2, y2 = integer_box(shape)
                annotations.append(
                    _grounding_annotation(annotations, images, [x1, y1, x2 - x1, y2 - y1], own)
                )
    return _grounding(images, annotations)


def refexp_json(
    expressions: list[tuple[int, Scene, Expression]], params: ShapesParams
) -> dict[str, Any]:
    """MDETR-style referring json: one "image" with one annotation per expression."""
    images, annotations = [], []
    for number, scene, expression in expressions:
        images.append(
            _caption_entry(number, params, expression.text)
            | {
                "id": len(images) + 1,
                "dataset_name": expression.group,
                "original_id": number,
                "candidates": [xywh(scene.objects[i]) for i in expression.candidates],
            }
        )
        target = xywh(scene.objects[expression.target])
        spans = [list(span) for span in expression.spans]
        entry = _grounding_annotation(annotations, images, target, spans)
        annotations.append(entry | {"original_id": number})
    return _grounding(images, annotations)


def mixed_json(
    expressions: list[tuple[int, Scene, Expression]], params: ShapesParams
) -> dict[str, Any]:
    """MDETR-style mixed json: one "image" per caption of several expressions about an image.

    Expressions of an image, which must follow each other, are shuffled and dealt to as few
    captions as ``params.expressions_per_caption`` allows, with a period between two of them. An
    object that several of them mean is one annotation with all their spans.
    """
    images, annotations = [], []
    for number, group in itertools.groupby(expressions, key=lambda item: item[0]):
        found = list(group)
        scene = found[0][1]
        order = np.random.default_rng([params.seed, number, 98]).permutation(len(found))
        captions = -(-len(found) // params.expressions_per_caption)
        for places in np.array_split(order, captions):
            text, spans = "", defaultdict(list)
            for expression in (found[place][2] for place in places):
                text += ". " if text else ""
                start = len(text)
                text += expression.text
                spans[expression.target] += [[start + b, start + e] for b, e in expression.spans]
            images.append(
                _caption_entry(number, params, text)
                | {"id": len(images) + 1, "dataset_name": "mixed", "original_id": number}
            )
            for target in sorted(spans):
                box = xywh(scene.objects[target])
                annotations.append(_grounding_annotation(annotations, images, box, spans[target]))
    return _grounding(images, annotations)


def _grounding_annotation(
    annotations: list[dict[str, Any]],
    images: list[dict[str, Any]],
    bbox: list[float],
    spans: list[list[int]],
) -> dict[str, Any]:
    return {
        "id": len(annotations) + 1,
        "image_id": images[-1]["id"],
        "category_id": 1,
        "bbox": bbox,
        "area": round(bbox[2] * bbox[3], 2),
        "iscrowd": 0,
        "tokens_positive": spans,
    }


def _grounding(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "info": INFO,
        "licenses": LICENSES,
        "images": images,
        "annotations": annotations,
        "categories": GROUNDING_CATEGORIES,
    }
