"""Writes the tables of docs/performance.md from the files of benchmarks/results/.

    python -m benchmarks table [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is that of a
result file. `--check` changes nothing and fails where the document and the results differ.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
DOCUMENT = FOLDER.parent / "docs" / "performance.md"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet: `python -m benchmarks {name}` does it.\n"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_spread(values: dict[str, float], digits: int = 2) -> str:
    """The median, with the smallest and the largest in brackets."""
    low, high = (f"{values[name]:.{digits}f}" for name in ("min", "max"))
    return f"{values['median']:.{digits}f} ({low}..{high})"


def origin(report: dict[str, Any]) -> str:
    """What it was measured on and how."""
    machine = report["machine"]
    cpu, threads = machine["cpu"], machine.get("threads")
    count = f"{threads} threads" if threads else f"{machine['cpu_count']} processors"
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "torchvision") if name in machine
    )
    found = f"{cpu}, {count}" + (f", {versions}" if versions else "")
    if "matrix_product_gflops" in report:
        rates = report["matrix_product_gflops"]
        found += "; matrix products at " + " and ".join(
            f"{rate:.0f} GFLOP/s in {kind}" for kind, rate in rates.items()
        )
    return f"{found}. `{report['command']}`\n"


def comparison_table(report: dict[str, Any]) -> str:
    """Of model, chunks and training_step."""
    variants = report["variants"]
    names = [part for found in variants.values() for part in found["parts"]]
    parts = list(dict.fromkeys(names))
    head = ["", "seconds", "of reference", "peak memory, MiB", *(f"{p}, s" for p in parts)]
    rows = []
    for name, found in variants.items():
        cells = [f"{found['parts'][part]:.2f}" if part in found["parts"] else "" for part in parts]
        rows.append(
            [
                name,
                with_spread(found["seconds"]),
                with_spread(found["share_of_reference"]),
                str(found["memory"]["peak_mib"]),
                *cells,
            ]
        )
    work = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report["work"].items())
    found = dict(report["largest_relative_differences"])
    missing = found.pop("detections_missing", None)
    differences = ", ".join(f"{key.replace('_', ' ')} {value:.2g}" for key, value in found.items())
    text = (
        f"Work: {work}. {report['repeats']} rounds.\n\n"
        + markdown(head, rows)
        + f"\nLargest relative differences between product and reference: {differences}.\n"
    )
    if missing is not None:
        text += f"Share of the reference's detections that the product misses: {missing:.2g}.\n"
    return text


def deform_conv_table(report: dict[str, Any]) -> str:
    rows = []
    for case, found in report["cases"].items():
        for method, seconds in found["seconds"].items():
            rows.append(
                [case, method, with_spread(seconds["forward"], 4), with_spread(seconds["both"], 4)]
            )
    return markdown(["case", "method", "forward, s", "forward and backward, s"], rows)


def focal_loss_table(report: dict[str, Any]) -> str:
    rows = [
        [
            case,
            method,
            *(f"{1000 * seconds[part]['median']:.2f}" for part in ("forward", "both")),
            f"{found['extra_memory_mib'][method]:.1f}",
        ]
        for case, found in report["cases"].items()
        for method, seconds in found["seconds"].items()
    ]
    head = ["case", "method", "forward, ms", "forward and backward, ms", "extra memory, MiB"]
    return markdown(head, rows)


def data_loading_table(report: dict[str, Any]) -> str:
    sizes = report["results"]
    kinds = list(next(iter(sizes.values()))["images_per_second"])
    rows = [
        [size, *(f"{found['images_per_second'][kind]:.0f}" for kind in kinds)]
        for size, found in sizes.items()
    ]
    return f"Images per second and {report['per']}.\n\n" + markdown(["images", *kinds], rows)


def lvis_scoring_table(report: dict[str, Any]) -> str:
    rows = [
        [name, f"{found['cpu_seconds']:.1f}", f"{found['memory_mib']:.0f}"]
        for name, found in report["results"].items()
    ]
    return markdown(["evaluator", "processor seconds", "memory, MiB"], rows)


def flickr_scoring_table(report: dict[str, Any]) -> str:
    rows = [[name, with_spread(found)] for name, found in report["cpu_seconds"].items()]
    return markdown(["evaluator", "processor seconds"], rows)


def start_up_table(report: dict[str, Any]) -> str:
    rows = [
        [name, with_spread(found["seconds"]), with_spread(found["cpu_seconds"])]
        for name, found in report["results"].items()
    ]
    return markdown(["program", "seconds", "processor seconds"], rows)


def compiled_table(report: dict[str, Any]) -> str:
    rows = [
        [case, found["image"], f"{found['first_pass_seconds']:.0f}"]
        + [with_spread(seconds, 3) for seconds in found["seconds"].values()]
        for case, found in report["results"].items()
    ]
    kinds = next(iter(report["results"].values()))["seconds"]
    head = ["model", "image", "first pass, s", *(f"{kind}, s" for kind in kinds)]
    return f"{report['repeats']} rounds.\n\n" + markdown(head, rows)


def export_table(report: dict[str, Any]) -> str:
    results = report["results"]
    names = [
        "",
        "MB",
        "processor seconds",
        "AP",
        "AP50",
        "missing",
        "scores differ by",
        "boxes, pixels",
    ]
    rows = []
    for name, found in results.items():
        row = [name, f"{found['megabytes']:.1f}", with_spread(found["cpu_seconds"], 3)]
        row += [f"{found[key]:.1f}" for key in ("AP", "AP50")]
        if "missing" in found:
            row += [
                f"{found['missing']} of {found['detections']}",
                f"{found['largest_score_difference']:.2g}",
                f"{found['largest_box_difference_px']:.2g}",
            ]
        rows.append(row + [""] * (len(names) - len(row)))
    return (
        f"{report['images']} images, {report['classes']} classes; a detection with a score above "
        "0.3 is missing where none of its class overlaps by 0.9.\n\n" + markdown(names, rows)
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": comparison_table,
    "chunks": comparison_table,
    "training_step": comparison_table,
    "deform_conv": deform_conv_table,
    "focal_loss": focal_loss_table,
    "data_loading": data_loading_table,
    "lvis_scoring": lvis_scoring_table,
    "flickr_scoring": flickr_scoring_table,
    "export": export_table,
    "compiled": compiled_table,
    "start_up": start_up_table,
}


def render(document: str, results: Path = RESULTS) -> str:
    """The document with its tables made anew.

    Raises:
        ValueError: a table whose name is unknown.
    """

    def table(found: re.Match[str]) -> str:
        start, name, end = found.groups()
        if name not in TABLES:
            raise ValueError(f"There is no table {name!r}; known are {', '.join(TABLES)}.")
        path = results / f"{name}.json"
        if not path.exists():
            return f"{start}{NOT_MEASURED.format(name=name)}{end}"
        report = json.loads(path.read_text("utf-8"))
        return f"{start}{TABLES[name](report)}\n{origin(report)}{end}"

    return PLACE.sub(table, document)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    before = DOCUMENT.read_text("utf-8")
    after = render(before)
    if args.check:
        if before != after:
            sys.stderr.write(f"error: {DOCUMENT.name} is not what the results say\n")
        return int(before != after)
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
