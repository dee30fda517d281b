"""REFER's RefCOCO, RefCOCO+ and RefCOCOg -> MDETR-style finetune_{dataset}_{split}.json.

    python datasets/prepare/refcoco.py --dataset refcoco \\
        --refs "datasets/refer/refcoco/refs(unc).p" \\
        --instances datasets/refer/refcoco/instances.json --output datasets/mdetr_annotations

Expected tree (from the authors of REFER; images are not read):

    datasets/refer/
      refcoco/refs(unc).p     instances.json
      refcoco+/refs(unc).p    instances.json
      refcocog/refs(umd).p    refs(google).p    instances.json

Each sentence becomes an "image" with one annotation. The refs may be json as well; a pickle is
read without running anything in it, and refused where it holds more than plain values.

The words that name the box are the whole expression by default. With --target root they are its
root noun phrase by a simple rule, without a parser: the words before the first one of a fixed list
of prepositions, relative pronouns and verbs (CUT_WORDS in this file), where "left" and "right"
right before "of" and "next" or "close" right before "to" count as prepositions. What stands before
the cut must be more than articles, or the cut is made later. MDETR's files hold the root that a
parser found, so that theirs differ from either.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    GroundingFile,
    checked_box,
    checked_size,
    checked_text,
    fields,
    has_extent,
    is_finished,
    progress,
    read_coco,
    report,
    run,
    script_parser,
)
from refer import read_refs

DATASETS = ("refcoco", "refcoco+", "refcocog")
TARGETS = ("expression", "root")
ARTICLES = frozenset(("a", "an", "the"))
CUT_WORDS = frozenset(
    """
    about above across against along among around at behind below beneath beside besides between by
    facing for from in inside into near nearest of off on onto opposite out outside over past
    through to toward towards under underneath up upon with within without
    that which who whom whose where while
    is are was has have having looks looking wearing wears holding holds sitting sits seated
    standing stands walking riding eating playing lying laying leaning carrying touching reaching
    pointing talking using hanging parked
    """.split()
)
# Prepositions of two words: the first may be an adjective elsewhere ("the left man").
CUT_PAIRS = frozenset((("left", "of"), ("right", "of"), ("next", "to"), ("close", "to")))


def root_length(expression: str) -> int:
    """How many characters at the start of an expression are its root noun phrase (at least 1).

    Args:
        expression: words joined by single spaces.
    """
    words = expression.split(" ")
    plain = [re.sub(r"\W+$", "", word.lower()) for word in words]
    followers = [*plain[1:], ""]
    for place, pair in enumerate(zip(plain, followers)):
        named = any(word and word not in ARTICLES for word in plain[:place])
        if named and (pair[0] in CUT_WORDS or pair in CUT_PAIRS):
            return len(" ".join(words[:place]).rstrip(" ,;:."))
    return len(expression)


def coco_file_name(name: str) -> str:
    """COCO's name of an image from REFER's, which has the number of the annotation behind it."""
    return re.sub(r"^(COCO_[a-z]+\d{4}_\d{12})_\d+(?=\.)", r"\1", Path(name).name)


class Instances:
    """Images and annotations of a COCO json by id, with messages that name the ref at fault."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_coco(path, "images", "annotations")
        self._images = {image.get("id"): image for image in content["images"]}
        self._annotations = {entry.get("id"): entry for entry in content["annotations"]}

    def of_ref(self, ref: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The image and the annotation of a ref. ValueError where they are not in the file."""
        try:
            image, entry = self._images[ref["image_id"]], self._annotations[ref["ann_id"]]
        except KeyError as error:
            what = "image" if ref["image_id"] not in self._images else "annotation"
            raise ValueError(
                f"The ref {ref['ref_id']} is about the {what} {error.args[0]}, which {self.path} "
                "does not have: give the instances.json that came with these refs."
            ) from None
        if entry.get("image_id") != ref["image_id"]:
            raise ValueError(
                f"The ref {ref['ref_id']} says that annotation {ref['ann_id']} is on image "
                f"{ref['image_id']}, but {self.path} says {entry.get('image_id')}."
            )
        return image, entry


def convert(
    refs: Sequence[dict[str, Any]], instances: Instances, dataset: str, target: str
) -> tuple[GroundingFile, Counter]:
    """The json of the refs of one split, and what was left out.

    Raises:
        ValueError: a ref does not fit the instances, or lacks what it should have.
    """
    output = GroundingFile(f"{dataset}, one sentence per image, target: {target}")
    left_out: Counter = Counter()
    for ref in progress(refs, dataset):
        image, entry = instances.of_ref(ref)
        where = f"{instances.path}: the annotation {ref['ann_id']}"
        box = checked_box(*fields(entry, ("bbox",), where), where)
        if not has_extent(box):
            left_out["refs whose box has no extent"] += 1
            continue
        where = f"{instances.path}: the image {image['id']}"
        width, height = checked_size(fields(image, ("width", "height"), where), where)
        file_name = image.get("file_name") or coco_file_name(*fields(ref, ("file_name",), where))
        for sentence in ref["sentences"]:
            where = f"A sentence of the ref {ref['ref_id']}"
            caption = checked_text(*fields(sentence, ("sent",), where), where)
            if not caption:
                left_out["sentences without words"] += 1
                continue
            output.add_caption(
                caption,
                file_name=file_name,
                width=width,
                height=height,
                dataset_name=dataset,
                original_id=image["id"],
            )
            end = root_length(caption) if target == "root" else len(caption)
            output.add_box(
                box, [(0, end)], area=entry.get("area", box[2] * box[3]), original_id=ref["ann_id"]
            )
    return output, left_out


def work(args: argparse.Namespace) -> None:
    by_split = defaultdict(list)
    for ref in read_refs(args.refs):
        by_split[ref["split"]].append(ref)
    unknown = sorted(set(args.splits or ()) - set(by_split))
    if unknown:
        raise ValueError(
            f"{args.refs} has no split {', '.join(unknown)}: it has {', '.join(sorted(by_split))}."
        )
    instances = None
    for split in args.splits or sorted(by_split):
        path = args.output / f"finetune_{args.dataset}_{split}.json"
        if is_finished(path, args.overwrite):
            continue
        instances = instances or Instances(args.instances)
        output, left_out = convert(by_split[split], instances, args.dataset, args.target)
        output.write(path)
        images = {image["original_id"] for image in output.images}
        counts = {
            "images": len(images),
            "sentences": len(output.images),
            "boxes": len({entry["original_id"] for entry in output.annotations}),
        }
        report(path, counts, left_out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--dataset", choices=DATASETS, required=True)
    parser.add_argument("--refs", type=Path, required=True, help="refs(...).p or json")
    parser.add_argument("--instances", type=Path, required=True, help="COCO json of the boxes")
    parser.add_argument("--output", type=Path, required=True, help="folder of the json files")
    parser.add_argument("--splits", nargs="+", help="default: all that the refs have")
    parser.add_argument("--target", choices=TARGETS, default="expression")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
