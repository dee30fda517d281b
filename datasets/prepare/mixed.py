"""Visual Genome regions, GQA scene graphs and RefCOCO sentences -> MDETR-style final_mixed*.json.

    python datasets/prepare/mixed.py --regions datasets/vg/region_descriptions.json \\
        --image-data datasets/vg/image_data.json \\
        --scene-graphs datasets/gqa/train_sceneGraphs.json datasets/gqa/val_sceneGraphs.json \\
        --refs datasets/mdetr_annotations/finetune_refcoco_train.json \\
        --output datasets/mdetr_annotations/final_mixed_train.json
    (for final_mixed_train_no_coco.json: --no-coco instead of --refs)

Expected tree (any of the three sources will do; images are not read):

    datasets/vg/region_descriptions.json    Visual Genome 1.2 or later
    datasets/vg/image_data.json             sizes of the images, and which of them are COCO's
    datasets/gqa/*_sceneGraphs.json         objects with names, attributes and boxes
    datasets/mdetr_annotations/finetune_*_train.json    made by refcoco.py

Phrases about an image (a region's description, an object's attributes and name, a referring
expression) are joined by ". " into captions of at most --max-words words, several per image where
needed. A phrase that occurs again, in whatever case, stands there once with several boxes, of which
those that overlap an earlier one by IoU > 0.9 are left out. Boxes are clipped to the image. Equal
boxes of different phrases are one box with several spans.

data_source says where images are: "vg" <id>.jpg in the folder of GQA's or Visual Genome's images,
"coco" in that of COCO's train2014. --no-coco leaves out all images that are COCO's, by the coco_id
of image_data.json. 20,000 images with a million regions took 0.76 GB of memory.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Box,
    GroundingFile,
    Span,
    checked_box,
    checked_size,
    checked_text,
    clip_box,
    fields,
    has_extent,
    is_finished,
    join_with_spans,
    progress,
    read_coco,
    read_json,
    report,
    run,
    script_parser,
)
from pycocotools import mask

SEPARATOR = ". "
SAME_BOX_IOU = 0.9


@dataclass
class DescribedImage:
    """An image and what is said about it.

    Attributes:
        entry: the image's values for the output; ``width`` and ``height`` among them.
        phrases: (words, box) in the order of the source.
    """

    entry: dict[str, Any]
    phrases: list[tuple[str, Box]] = field(default_factory=list)


def as_phrase(text: str) -> str:
    """No punctuation at the ends; empty where no letter or digit is left."""
    phrase = text.strip(" .,;:")
    return phrase if any(character.isalnum() for character in phrase) else ""


def without_repeats(boxes: Sequence[Box]) -> list[Box]:
    """The boxes, less those that overlap an earlier one that stays by IoU > 0.9."""
    if len(boxes) == 1:
        return list(boxes)
    array = np.asarray(boxes, dtype=np.float64)
    same = mask.iou(array, array, [0] * len(boxes)) > SAME_BOX_IOU
    kept: list[int] = []
    for place in range(len(boxes)):
        if not same[place, kept].any():
            kept.append(place)
    return [boxes[place] for place in kept]


def boxes_by_phrase(image: DescribedImage, left_out: Counter) -> dict[str, list[Box]]:
    """Each phrase, as first written, with its different boxes inside the image."""
    spelling: dict[str, str] = {}
    found: defaultdict[str, list[Box]] = defaultdict(list)
    for text, box in image.phrases:
        phrase = as_phrase(text)
        if not phrase:
            left_out["phrases without words"] += 1
            continue
        box = clip_box(box, image.entry["width"], image.entry["height"])
        if not has_extent(box):
            left_out["boxes without extent in the image"] += 1
            continue
        found[spelling.setdefault(phrase.lower(), phrase)].append(box)
    for phrase, boxes in found.items():
        found[phrase] = without_repeats(boxes)
        left_out["repeated boxes of a phrase"] += len(boxes) - len(found[phrase])
    return found


def pack(phrases: Iterable[str], max_words: int) -> Iterator[list[str]]:
    """Cuts the phrases, in order, into groups of at most ``max_words`` words (or one phrase)."""
    group: list[str] = []
    total = 0
    for phrase in phrases:
        words = len(phrase.split())
        if group and total + words > max_words:
            yield group
            group, total = [], 0
        group.append(phrase)
        total += words
    if group:
        yield group


def add_image(
    output: GroundingFile, image: DescribedImage, max_words: int, left_out: Counter
) -> None:
    """Adds the captions of an image with their boxes."""
    found = boxes_by_phrase(image, left_out)
    short = [phrase for phrase in found if len(phrase.split()) <= max_words]
    left_out["phrases of too many words"] += len(found) - len(short)
    if not short:
        left_out["images without a phrase"] += 1
    for group in pack(short, max_words):
        caption, spans = join_with_spans(group, SEPARATOR)
        named: defaultdict[tuple, list[Span]] = defaultdict(list)
        for phrase, span in zip(group, spans):
            for box in found[phrase]:
                named[tuple(box)].append(span)
        output.add_caption(caption, **image.entry)
        for box, own in named.items():
            output.add_box(list(box), own)


def _entry(source: str, image_id: Any, file_name: str, width: Any, height: Any) -> dict[str, Any]:
    return {
        "file_name": file_name,
        "width": width,
        "height": height,
        "dataset_name": "mixed",
        "data_source": source,
        "original_img_id": image_id,
    }


class ImageData:
    """Visual Genome's image_data.json by id."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_json(path, "Visual Genome publishes it as image_data.json.")
        if not isinstance(content, list):
            raise ValueError(f"{path} is not Visual Genome's image_data.json: it holds no list.")
        self._images: dict[str, tuple[int, int, int | None]] = {}
        for place, image in enumerate(content):
            where = f"{path}: the image at place {place}"
            image_id, *size = fields(image, ("image_id", "width", "height", "coco_id"), where)
            self._images[str(image_id)] = (*size,)

    def get(self, image_id: Any) -> tuple[int, int, int | None] | None:
        """Width, height and COCO id (None where COCO does not have it); None where unknown."""
        return self._images.get(str(image_id))


def region_phrases(entry: dict[str, Any], where: str) -> list[tuple[str, Box]]:
    """(words, box) of each region of an image of region_descriptions.json."""
    found = []
    for region in fields(entry, ("regions",), where)[0]:
        text, *box = fields(region, ("phrase", "x", "y", "width", "height"), f"{where}: a region")
        text = checked_text(text, f"{where}: a region")
        found.append((text, checked_box(box, f"{where}: the region {text!r}")))
    return found


def object_phrases(graph: dict[str, Any], where: str) -> list[tuple[str, Box]]:
    """(attributes and name, box) of each object of a scene graph."""
    found = []
    for key, item in fields(graph, ("objects",), where)[0].items():
        own = f"{where}: the object {key}"
        name, *box = fields(item, ("name", "x", "y", "w", "h"), own)
        words = [checked_text(word, own) for word in (*item.get("attributes", ()), name)]
        found.append((" ".join(words), checked_box(box, own)))
    return found


def genome_images(
    regions: Path | None,
    scene_graphs: Sequence[Path],
    data: ImageData | None,
    no_coco: bool,
    left_out: Counter,
) -> Iterator[DescribedImage]:
    """The images of Visual Genome and GQA; what both say about one comes together.

    Raises:
        ValueError: a file is not of its format, or an image with regions is not in ``data``.
    """
    graphs: dict[str, tuple[dict[str, Any], str]] = {}
    for path in scene_graphs:
        content = read_json(path, "GQA publishes it in its archive of scene graphs.")
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not GQA's scene graphs: it holds no object by image ids.")
        graphs.update((key, (graph, f"{path}: the image {key}")) for key, graph in content.items())
    described = read_json(regions) if regions else []
    if not isinstance(described, list):
        raise ValueError(f"{regions} is not Visual Genome's regions: it holds no list of images.")
    described.reverse()
    for _ in progress(range(len(described)), "regions"):
        entry = described.pop()  # memory: what was read is of no further use
        (image_id,) = fields(entry, ("id",), f"An image of {regions}")
        known = data.get(image_id)
        if known is None:
            raise ValueError(
                f"The image {image_id} of {regions} is not in {data.path}: the two files must be "
                "of the same version of Visual Genome."
            )
        image = _genome_image(image_id, known[:2], known)
        image.phrases += region_phrases(entry, f"{regions}: the image {image_id}")
        graph = graphs.pop(str(image_id), None)
        if graph is not None:
            image.phrases += object_phrases(*graph)
        yield from _unless_coco(image, no_coco, left_out)
    for key, (graph, where) in progress(list(graphs.items()), "scene graphs"):
        known = data.get(key) if data else None
        if no_coco and known is None:
            left_out["images of which image_data.json does not say whether COCO has them"] += 1
            continue
        image = _genome_image(key, fields(graph, ("width", "height"), where), known)
        image.phrases += object_phrases(graph, where)
        yield from _unless_coco(image, no_coco, left_out)


def _genome_image(
    image_id: Any, size: Sequence[int], known: tuple[int, int, int | None] | None
) -> DescribedImage:
    name = str(image_id)
    if not name.isalnum():
        raise ValueError(f"{image_id!r} is no id of an image.")
    where = f"Visual Genome's image {name}"
    number = int(name) if name.isdecimal() else name
    entry = _entry("vg", number, f"{name}.jpg", *checked_size(size, where))
    if known is not None:  # null says that COCO does not have it: refexp_clean.py needs that
        entry["coco_id"] = known[2]
    return DescribedImage(entry)


def _unless_coco(
    image: DescribedImage, no_coco: bool, left_out: Counter
) -> Iterator[DescribedImage]:
    if no_coco and image.entry["coco_id"] is not None:
        left_out["images of COCO"] += 1
    else:
        yield image


def coco_images(refs: Sequence[Path]) -> Iterable[DescribedImage]:
    """The images of MDETR-style RefCOCO files, with all their expressions."""
    images: dict[Any, DescribedImage] = {}
    for path in refs:
        content = read_coco(path, "images", "annotations")
        captions = {}
        for entry in content["images"]:
            where = f"{path}: the image {entry.get('id')}"
            key, caption, coco_id, file_name, *size = fields(
                entry, ("id", "caption", "original_id", "file_name", "width", "height"), where
            )
            captions[key] = (coco_id, checked_text(caption, where))
            shared = _entry("coco", coco_id, file_name, *checked_size(size, where))
            images.setdefault(coco_id, DescribedImage(shared))
        for annotation in content["annotations"]:
            where = f"{path}: the annotation {annotation.get('id')}"
            key, box = fields(annotation, ("image_id", "bbox"), where)
            if key not in captions:
                raise ValueError(f"{where} belongs to the image {key!r}, which is not there.")
            coco_id, caption = captions[key]
            images[coco_id].phrases.append((caption, checked_box(box, where)))
    return images.values()


def work(args: argparse.Namespace) -> None:
    if not (args.regions or args.scene_graphs or args.refs):
        raise ValueError("Name a source at least: --regions, --scene-graphs or --refs.")
    if args.no_coco and args.refs:
        raise ValueError("--refs are about COCO's images, which --no-coco leaves out: give one.")
    if (args.regions or args.no_coco) and not args.image_data:
        raise ValueError("--regions and --no-coco need --image-data.")
    if args.max_words < 1:
        raise ValueError("--max-words must be at least 1.")
    if is_finished(args.output, args.overwrite):
        return
    data = ImageData(args.image_data) if args.image_data else None
    left_out: Counter = Counter()
    output = GroundingFile("Visual Genome regions, GQA scene graphs and RefCOCO, joined")
    for image in genome_images(args.regions, args.scene_graphs, data, args.no_coco, left_out):
        add_image(output, image, args.max_words, left_out)
    for image in progress(coco_images(args.refs), "refs"):
        add_image(output, image, args.max_words, left_out)
    if not output.images:
        raise ValueError("Nothing is left of the sources: no image has a phrase with a box.")
    output.write(args.output)
    sources = {(image["data_source"], image["original_img_id"]) for image in output.images}
    counts = {
        "images": len(sources),
        "captions": len(output.images),
        "boxes": len(output.annotations),
    }
    report(args.output, counts, left_out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--regions", type=Path, help="region_descriptions.json")
    parser.add_argument("--image-data", type=Path, help="image_data.json")
    parser.add_argument("--scene-graphs", type=Path, nargs="+", default=[])
    parser.add_argument("--refs", type=Path, nargs="+", default=[], help="finetune_*_train.json")
    parser.add_argument("--no-coco", action="store_true", help="leave out images of COCO")
    parser.add_argument("--max-words", type=int, default=120, help="per caption; default: 120")
    parser.add_argument("--output", type=Path, required=True, help="json to write")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
