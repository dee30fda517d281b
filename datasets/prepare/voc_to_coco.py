"""Pascal VOC XML files -> one COCO json.

    python datasets/prepare/voc_to_coco.py --root datasets/VOC2012 --list trainval \\
        --output datasets/VOC2012/instances_trainval.json

Expected tree (VOC's own, or any tool's that writes VOC):

    datasets/VOC2012/
      Annotations/<id>.xml
      ImageSets/Main/<list>.txt    ids, one per line; without --list every XML is taken, sorted
      JPEGImages/<id>.jpg          only read where an XML does not give the size of its image

VOC counts pixels from 1 and its corners belong to the box: (xmin, ymin, xmax, ymax) becomes
(xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1). Many tools count from 0 and mean borders:
with --zero-based it becomes (xmin, ymin, xmax - xmin, ymax - ymin). Objects marked difficult are
crowds by default, which COCO's evaluation neither demands nor punishes and training leaves out;
see --difficult. Images without objects stay.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from common import (
    Box,
    checked_box,
    coco_counts,
    has_extent,
    is_finished,
    progress,
    read_text,
    report,
    run,
    script_parser,
    write_json,
    xml_root,
    xml_size,
)
from PIL import Image

DIFFICULT = ("crowd", "ignore", "keep", "drop")


def voc_box(item: ElementTree.Element, zero_based: bool, where: str) -> Box:
    """The box of an ``object`` as [x, y, width, height]. ValueError where it has none."""
    texts = [item.findtext(f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x1, y1, x2, y2 = (float(text) for text in texts)
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: the object {item.findtext('name')!r} has the corners {texts} instead of "
            "four numbers in its bndbox."
        ) from None
    shift = 0 if zero_based else 1
    return checked_box([x1 - shift, y1 - shift, x2 - x1 + shift, y2 - y1 + shift], where)


def image_entry(root: ElementTree.Element, images: Path, name: str, where: str) -> dict[str, Any]:
    """``file_name``, ``width`` and ``height``, from the XML or else from the image.

    Raises:
        ValueError: neither gives the size.
    """
    # Only the name: some tools write the path on the annotator's machine.
    written = root.findtext("filename", "").replace("\\", "/").split("/")[-1].strip()
    file_name = written or f"{name}.jpg"
    size = xml_size(root)
    if size is None:
        try:
            with Image.open(images / file_name) as image:
                size = image.size
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{where} does not give the size of its image, and {images / file_name} cannot be "
                f"read ({error})."
            ) from error
    return {"file_name": file_name, "width": size[0], "height": size[1]}


def read_classes(path: Path) -> list[str]:
    """Class names of a file, one per line, in order. ValueError where it has none or repeats."""
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{path} must name each class once, one per line.")
    return names


def convert(
    xml_files: Sequence[Path],
    images: Path,
    *,
    classes: Sequence[str] | None = None,
    zero_based: bool = False,
    difficult: str = "crowd",
) -> tuple[dict[str, Any], Counter]:
    """The COCO json, and what was left out.

    Args:
        xml_files: one per image; image ids are positions in this list, from 1.
        images: folder of the images.
        classes: names in the order of the category ids (from 1); None for those found, sorted.
        zero_based, difficult: see the docstring of the script.

    Raises:
        FileNotFoundError, ValueError: an XML is missing or damaged, or names another class.
    """
    entries, annotations, left_out = [], [], Counter()
    for image_id, path in enumerate(progress(xml_files, "annotations"), start=1):
        root = xml_root(read_text(path), str(path))
        entries.append({"id": image_id, **image_entry(root, images, path.stem, str(path))})
        for item in root.findall("object"):
            name = (item.findtext("name") or "").strip()
            if not name:
                raise ValueError(f"{path}: an object has no name.")
            if classes is not None and name not in classes:
                raise ValueError(f"{path}: the class {name!r} is not among those of --classes.")
            hard = item.findtext("difficult", "0").strip() == "1"
            if hard and difficult == "drop":
                left_out["difficult objects"] += 1
                continue
            box = voc_box(item, zero_based, str(path))
            if not has_extent(box):
                left_out["boxes without extent"] += 1
                continue
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": name,  # its number is known when all names are
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(hard and difficult == "crowd"),
            }
            if hard and difficult == "ignore":
                annotation["ignore"] = 1
            annotations.append(annotation)
    if classes is None:
        classes = sorted({annotation["category_id"] for annotation in annotations})
    number = {name: place for place, name in enumerate(classes, start=1)}
    for annotation in annotations:
        annotation["category_id"] = number[annotation["category_id"]]
    categories = [{"id": i, "name": name, "supercategory": "none"} for name, i in number.items()]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    return content, left_out


def find_xml_files(root: Path, image_list: str | None) -> list[Path]:
    """The XML files of a list in ImageSets/Main (or a list file), or all of them, sorted."""
    folder = root / "Annotations"
    if image_list is None:
        files = sorted(folder.glob("*.xml"))
        if not files:
            raise FileNotFoundError(f"{folder} holds no XML files: --root must hold Annotations.")
        return files
    path = Path(image_list)
    if not path.suffix:
        path = root / "ImageSets" / "Main" / f"{image_list}.txt"
    # The lists of single classes have 1 or -1 behind the id.
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} names no image.")
    return [folder / f"{line[0]}.xml" for line in lines]


def work(args: argparse.Namespace) -> None:
    if is_finished(args.output, args.overwrite):
        return
    content, left_out = convert(
        find_xml_files(args.root, args.list),
        args.root / args.images,
        classes=read_classes(args.classes) if args.classes else None,
        zero_based=args.zero_based,
        difficult=args.difficult,
    )
    if not content["categories"]:
        raise ValueError(f"{args.root}: no XML has an object, so that there are no classes.")
    write_json(args.output, content)
    report(args.output, coco_counts(content), left_out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds Annotations")
    parser.add_argument("--output", type=Path, required=True, help="COCO json to write")
    parser.add_argument("--list", help="name of a list in ImageSets/Main, or path of a .txt")
    parser.add_argument("--images", default="JPEGImages", help="folder of images in --root")
    parser.add_argument("--classes", type=Path, help="file with the class names in their order")
    parser.add_argument("--zero-based", action="store_true", help="pixels count from 0")
    parser.add_argument("--difficult", choices=DIFFICULT, default="crowd")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
