"""Flickr30k Entities -> MDETR-style json: final_flickr_separateGT_{train,val,test}.json.

    python datasets/prepare/flickr30k_entities.py \\
        --entities datasets/flickr30k/flickr30k --output datasets/mdetr_annotations

Expected tree (from the authors of Flickr30k Entities; images are not read):

    datasets/flickr30k/flickr30k/
      train.txt  val.txt  test.txt       ids of images, one per line
      Annotations/<id>.xml               boxes of entities
      Sentences/<id>.txt                 one sentence per line with [/EN#<entity>/<type> words]

Each sentence becomes an "image" with its words joined by single spaces. Its tokens_positive_eval
lists the phrases whose entity has a box in the image, in order of appearance: those that phrase
recall is measured on. Sentences without such a phrase stay. The corners of the XML are taken as
they are: a box is x1, y1, x2 - x1, y2 - y1. With --merged the boxes of an entity become the one
that encloses them, in files called final_flickr_mergedGT_*.json.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import (  # noqa: E402
    GroundingFile,
    Span,
    checked_box,
    has_extent,
    is_finished,
    join_with_spans,
    progress,
    read_text,
    report,
    run,
    script_parser,
    xml_root,
    xml_size,
)

from fiber_d2.evaluation.entities import (  # noqa: E402
    EntityImage,
    Phrase,
    parse_boxes,
    parse_sentences,
)

T = TypeVar("T")

TREE = "The folder of --entities must hold <split>.txt, Annotations/*.xml and Sentences/*.txt."


def words_of(line: str, phrases: Sequence[Phrase]) -> list[str]:
    """The words of a sentence without the markup of its phrases, which the parser found in it."""
    words = line.split()
    for phrase in phrases:
        del words[phrase.first_word]  # the tag; those of earlier phrases are gone already
        own = phrase.text.split()
        last = phrase.first_word + len(own) - 1
        if own and words[last] == own[-1] + "]":
            words[last] = own[-1]
        else:
            del words[last + 1]  # the bracket stands alone
    return words


def phrase_spans(words: Sequence[str], phrases: Sequence[Phrase]) -> tuple[str, list[Span]]:
    """The caption, and the (begin, end) characters of each phrase in it.

    Raises:
        ValueError: a phrase has no words.
    """
    caption, spans = join_with_spans(words, " ")
    found = []
    for phrase in phrases:
        if not phrase.text:
            raise ValueError(f"the phrase of entity {phrase.entity} in {caption!r} has no words")
        last = phrase.first_word + len(phrase.text.split()) - 1
        found.append((spans[phrase.first_word][0], spans[last][1]))
    return caption, found


def add_image(
    output: GroundingFile, entities: Path, name: str, merged: bool, left_out: Counter
) -> None:
    """Adds every sentence about an image.

    Raises:
        FileNotFoundError, ValueError: one of its two files is missing or damaged.
    """
    xml_path = entities / "Annotations" / f"{name}.xml"
    text_path = entities / "Sentences" / f"{name}.txt"
    xml, text = read_text(xml_path, TREE), read_text(text_path, TREE)
    root = xml_root(xml, str(xml_path))
    size = xml_size(root)
    if size is None:
        raise ValueError(f"{xml_path} does not give the size of the image.")
    image = EntityImage(
        boxes=_named(xml_path, parse_boxes, xml),
        sentences=_named(text_path, parse_sentences, text),
    )
    if merged:
        image = image.merged()
    lines = (line for line in text.splitlines() if line.strip())  # as the parser counts them
    for number, (line, phrases) in enumerate(zip(lines, image.sentences)):
        words = words_of(line, phrases)
        evaluable = image.evaluable(number)
        left_out["phrases without a box"] += len(phrases) - len(evaluable)
        caption, spans = _named(text_path, phrase_spans, words, evaluable)
        output.add_caption(
            caption,
            # Named after the id, so that no XML can lead out of the folder of images.
            file_name=name + (Path(root.findtext("filename", "")).suffix or ".jpg"),
            width=size[0],
            height=size[1],
            dataset_name="flickr",
            original_img_id=int(name) if name.isdecimal() else name,
            sentence_id=number,
            tokens_positive_eval=[[list(span)] for span in spans],
        )
        _add_boxes(output, image, evaluable, spans, left_out, str(xml_path))


def _named(path: Path, function: Callable[..., T], *args: Any) -> T:
    """``function(*args)``, with the file named where that fails."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error


def _add_boxes(
    output: GroundingFile,
    image: EntityImage,
    phrases: Sequence[Phrase],
    spans: Sequence[Span],
    left_out: Counter,
    where: str,
) -> None:
    # By corners: an object of several names is one box with the spans of all of them.
    named: dict[tuple[float, ...], list[Span]] = {}
    for phrase, span in zip(phrases, spans):
        for corners in dict.fromkeys(map(tuple, image.boxes[phrase.entity].tolist())):
            named.setdefault(corners, []).append(span)
    for (x1, y1, x2, y2), own in named.items():
        box = checked_box([x1, y1, x2 - x1, y2 - y1], where)
        if has_extent(box):
            output.add_box(box, own)
        else:
            left_out["boxes without extent"] += 1


def convert(entities: Path, split: str, merged: bool) -> tuple[GroundingFile, Counter, int]:
    """The json of a split, what was left out, and the number of images."""
    names = read_text(entities / f"{split}.txt", TREE).split()
    if not names:
        raise ValueError(f"{entities / f'{split}.txt'} names no image.")
    output = GroundingFile(f"Flickr30k Entities, {split}")
    left_out: Counter = Counter()
    for name in progress(names, split):
        if name != Path(name).name:
            raise ValueError(f"{entities / f'{split}.txt'}: {name!r} is no id of an image.")
        add_image(output, entities, name, merged, left_out)
    return output, left_out, len(names)


def work(args: argparse.Namespace) -> None:
    for split in args.splits:
        kind = "mergedGT" if args.merged else "separateGT"
        path = args.output / f"final_flickr_{kind}_{split}.json"
        if is_finished(path, args.overwrite):
            continue
        output, left_out, images = convert(args.entities, split, args.merged)
        output.write(path)
        counts = {
            "images": images,
            "sentences": len(output.images),
            "phrases": sum(len(image["tokens_positive_eval"]) for image in output.images),
            "boxes": len(output.annotations),
        }
        report(path, counts, left_out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--entities", type=Path, required=True, help="folder of the source tree")
    parser.add_argument("--output", type=Path, required=True, help="folder of the json files")
    parser.add_argument("--splits", nargs="+", default=["train", "val", "test"])
    parser.add_argument("--merged", action="store_true", help="one enclosing box per entity")
    return run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
