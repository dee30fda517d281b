"""Check a data set before it costs a training run: all of what is wrong with it.

    fiber-d2 validate --dataset NAME [NAME ...]
    fiber-d2 validate --coco-json F [F ...] --image-root D [--kind refexp]
    fiber-d2 validate --coco-json F --image-root D --fix REPAIRED.json
    fiber-d2 validate --dataset NAME --show 12 --output pictures

Looks at the entries and ids, the boxes, the image files (all of them are decoded), the captions
with their spans or the class names, and at images that several of the data sets share. Prints a
table and the first offenders of each check. Exit status: 0 without errors, 1 with errors (also
where --fix has repaired them in its copy), 2 for a mistake in the command, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from fiber_d2.data.validation import (
    KINDS,
    Options,
    Report,
    Source,
    draw_samples,
    errors_after_repair,
    format_report,
    repair,
    report_as_dict,
    source_of_dataset,
    source_of_json,
    validate,
)
from fiber_d2.engine.errors import (
    FAILURE_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    exit_status_of,
)
from fiber_d2.engine.overrides import import_user_modules
from fiber_d2.files import save_json
from fiber_d2.text import load_tokenizer

# That of the published models, and one that is always there.
TOKENIZER, FALLBACK = "roberta-base", "shapes"


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", nargs="+", metavar="NAME", help="names in the catalogue")
    what.add_argument("--coco-json", nargs="+", metavar="F", help="annotation files")
    add = parser.add_argument
    add("--image-root", metavar="D", help="folder of the images of --coco-json and --also-json "
        "(of LVIS: the one that holds train2017)")  # fmt: skip
    add("--kind", choices=KINDS, help="default: what the catalogue says; or grounding where there "
        "are captions, else detection")  # fmt: skip
    add("--tokenizer", metavar="NAME", help=f"name, folder or tokenizer.json; default: {TOKENIZER} "
        f"if it is here, else the bundled {FALLBACK}")  # fmt: skip
    add("--max-tokens", type=_positive, default=256, metavar="N", help="of a caption; default 256")
    add("--separator", default=". ", help="between the classes of a caption; default %(default)r")
    add("--workers", type=_count, metavar="N", help="processes that read images; default: one per "
        "core; 0: none")  # fmt: skip
    add("--no-images", action="store_true", help="do not look at the image files")
    add("--fix", metavar="OUT.json", help="write a repaired copy of the (only) annotation file")
    add("--show", type=_positive, metavar="N", help="draw N samples into the --output folder")
    add("--output", metavar="DIR", help="folder of the pictures")
    add("--json", metavar="REPORT.json", help="write all findings, machine-readable")
    add("--also-dataset", nargs="+", default=[], metavar="NAME", help="further splits, only looked "
        "at for images that they share with the others")  # fmt: skip
    add("--also-json", nargs="+", default=[], metavar="F", help="the same, as files")
    add("--import", dest="imports", action="append", default=[], metavar="MODULE_OR_FILE",
        help="import a module or .py file that registers data sets; may be repeated")  # fmt: skip
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def _count(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return int(text)


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: options do not fit each other.
    """
    if (args.coco_json or args.also_json) and not args.image_root:
        raise ValueError("--coco-json and --also-json need --image-root, the folder of the images.")
    if args.image_root and not os.path.isdir(args.image_root) and not args.no_images:
        raise ValueError(f"--image-root {args.image_root} is not a folder.")
    if (args.show is None) != (args.output is None):
        raise ValueError("--show and --output belong together: how many pictures, and where.")
    if args.fix and len(args.dataset or args.coco_json) > 1:
        raise ValueError("--fix takes one data set at a time.")


def load_sources(args: argparse.Namespace) -> tuple[list[Source], list[Source]]:
    """The data sets to check, and those to compare them with."""
    masks = bool(args.fix)  # to be written again
    sources = [source_of_dataset(n, kind=args.kind, with_masks=masks) for n in args.dataset or ()]
    for path in args.coco_json or ():
        sources.append(source_of_json(path, args.image_root, kind=args.kind, with_masks=masks))
    also = [source_of_dataset(name) for name in args.also_dataset]
    also += [source_of_json(path, args.image_root) for path in args.also_json]
    every = [*sources, *also]
    labels = [source.label for source in every]
    for source in every:  # files of one name in several folders
        if labels.count(source.label) > 1 and source.json_file:
            source.label = source.json_file
    if args.fix:
        if sources[0].json_file is None:
            raise ValueError(f"--fix: the data set {sources[0].label} is not a json file.")
        if any(s.json_file and _same_file(s.json_file, args.fix) for s in every):
            raise ValueError(f"--fix {args.fix} would overwrite what is checked: name a new file.")
    return sources, also


def _same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def find_tokenizer(name: str | None) -> PreTrainedTokenizerFast:
    if name is not None:
        return load_tokenizer(name)
    try:
        return load_tokenizer(TOKENIZER)
    except FileNotFoundError:
        sys.stderr.write(
            f"note: the tokenizer {TOKENIZER} is not here, so captions are checked with the "
            f"bundled {FALLBACK!r}, which needs more tokens for most words (--tokenizer names "
            "another)\n"
        )
        return load_tokenizer(FALLBACK)


def fix(report: Report, options: Options, path: str) -> str:
    """Write the repaired copy of the only source, and note in the report what was done.

    Returns:
        a line on how it went.
    """
    source, facts = report.sources[0], report.facts
    if report.stopped is not None:
        return "no repaired copy was written, because the checks did not come to their end"
    try:
        repaired, report.repairs = repair(source, facts)
    except ValueError as error:
        return f"no repaired copy was written: {error}"
    save_json(repaired, path)
    report.remaining = errors_after_repair(source, repaired, facts, options)
    return f"repaired copy: {path}"


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    import_user_modules(args.imports)
    sources, also = load_sources(args)
    options = Options(
        tokenizer=find_tokenizer(args.tokenizer),
        max_tokens=args.max_tokens,
        separator=args.separator,
        workers=args.workers,
        read_images=not args.no_images,
    )
    report = validate(sources, options, also)
    fixed = fix(report, options, args.fix) if args.fix else None
    sys.stdout.write(f"{format_report(report)}\n")
    if fixed:
        sys.stdout.write(f"{fixed}\n")
    if args.json:
        save_json(report_as_dict(report), args.json)
        sys.stdout.write(f"report: {args.json}\n")
    if report.stopped == "interrupted":
        return INTERRUPTED_EXIT_CODE
    if args.show:
        for source, contents in zip(report.sources, report.contents):
            folder = args.output
            if len(report.sources) > 1:
                folder = os.path.join(folder, re.sub(r"[^\w.-]+", "_", source.label))
            paths = draw_samples(source, contents, args.show, folder)
            pictures = max(0, len(paths) - 1)
            sys.stdout.write(f"{source.label}: {pictures} pictures in {folder}\n")
    return FAILURE_EXIT_CODE if report.has_errors or report.stopped else 0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The program, which `datasets/validate.py` and `fiber-d2 validate` are; its exit status."""
    args = build_parser(prog).parse_args(argv)
    return exit_status_of(lambda: run(args))


def prepare_process() -> None:
    """What the program wants of a process of its own."""
    # Said explicitly: tokenizers complain of processes that are started later otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # What the readers log of the data is found by the checks as well.
    logging.getLogger("fiber_d2.data").setLevel(logging.ERROR)
    # Names in annotation files may hold what the terminal cannot print.
    sys.stdout.reconfigure(errors="backslashreplace")
