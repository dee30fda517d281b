"""A report as text and as json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from tabulate import tabulate

from fiber_d2.text.prompts import shorten

from .checks import CHECKS, ERROR, INFO, LEVELS, WARNING, Finding
from .repair import REPAIRS
from .run import Report

SHOWN = 5  # offenders of each check
_CAPTION, _MESSAGE, _NAME = 300, 600, 120  # characters


def format_report(report: Report, *, shown: int = SHOWN) -> str:
    """What was checked, the table of findings, and the first offenders of each check."""
    return "\n".join(_lines(report, shown))


def _lines(report: Report, shown: int) -> Iterator[str]:
    for source, contents in zip(report.sources, report.contents):
        numbers = {"image": contents.num_images, "annotation": contents.num_annotations}
        if contents.classes:
            numbers["class"] = len(contents.classes)
        yield f"{source.label} ({source.kind}): {_counted(numbers)}"
    counts = report.counts()
    found = [check for level in LEVELS for check in CHECKS if _is(check, level) and counts[check]]
    if found:
        rows = [(check, CHECKS[check].level, counts[check]) for check in found]
        yield ""
        yield tabulate(rows, headers=("check", "level", "count"))
    by_check: dict[str, list[Finding]] = {check: [] for check in found}
    for finding in report.findings:
        by_check[finding.check].append(finding)
    for check in found:
        yield ""
        yield f"{check} ({CHECKS[check].level}): {CHECKS[check].about}"
        yield from _offenders(by_check[check], shown, len(report.sources) > 1)
    if report.repairs is not None:
        yield from _repairs(report, shown)
    yield ""
    totals = {level: sum(counts[check] for check in found if _is(check, level)) for level in LEVELS}
    summary = _counted({"error": totals[ERROR], "warning": totals[WARNING], "note": totals[INFO]})
    yield summary if report.stopped is None else f"NOT COMPLETE, {report.stopped}: {summary}"
    fixable = sum(counts[check] for check in found if _is(check, ERROR) and CHECKS[check].fixable)
    if fixable and report.repairs is None and report.sources[0].json_file is not None:
        yield f"--fix OUT.json writes a copy without {fixable} of the errors"


def _counted(numbers: dict[str, int]) -> str:
    """``{"box": 2}`` as "2 boxes"."""
    return ", ".join(
        f"{n} {word}{'' if n == 1 else 'es' if word.endswith('s') else 's'}"
        for word, n in numbers.items()
    )


def _plain(text: str, limit: int) -> str:
    """One short line that a terminal takes as text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shorten(text, limit))


def _around_span(caption: str) -> str:
    """A caption, without its beginning where that would push the marked span out of sight."""
    begin = caption.find("[") - _CAPTION // 3
    return f"... {caption[begin:]}" if begin > 0 and len(caption) > _CAPTION else caption


def _is(check: str, level: str) -> bool:
    return CHECKS[check].level == level


def _offenders(findings: Sequence[Finding], shown: int, with_source: bool) -> Iterator[str]:
    for finding in islice(findings, shown):
        parts = [finding.source] if with_source else []
        if finding.image_id is not None:
            parts.append(f"image {_plain(str(finding.image_id), _NAME)}")
        if finding.file_name is not None:
            parts.append(f"({_plain(finding.file_name, _NAME)})")
        if finding.annotation_id is not None:
            parts.append(f"annotation {_plain(str(finding.annotation_id), _NAME)}")
        place = " ".join(parts)
        message = _plain(finding.message, _MESSAGE)
        yield f"  {place}: {message}" if place else f"  {message}"
        if finding.caption is not None:
            yield f"      {_plain(_around_span(finding.caption), _CAPTION)}"
    if len(findings) > shown:
        yield f"  and {len(findings) - shown} more"


def _repairs(report: Report, shown: int) -> Iterator[str]:
    yield ""
    made = [(REPAIRS[key], report.repairs[key]) for key in REPAIRS if report.repairs[key]]
    yield tabulate(made, headers=("repaired", "count")) if made else "There was nothing to repair."
    if report.remaining:
        yield ""
        yield f"{_counted({'error': len(report.remaining)})} in the repaired copy:"
        by_check: dict[str, list[Finding]] = {}
        for finding in report.remaining:
            by_check.setdefault(finding.check, []).append(finding)
        for check, findings in by_check.items():
            yield f"  {check}: {len(findings)}"
            yield from (f"  {line}" for line in _offenders(findings, shown, False))


def report_as_dict(report: Report) -> dict[str, Any]:
    """Everything, of types that json knows."""
    counts = report.counts()
    return {
        "complete": report.stopped is None,
        "stopped": report.stopped,
        "sources": [
            {
                "label": source.label,
                "kind": source.kind,
                "json_file": source.json_file,
                "image_root": source.image_root,
                "images": contents.num_images,
                "annotations": contents.num_annotations,
                "classes": [name for _, name in contents.classes],
            }
            for source, contents in zip(report.sources, report.contents)
        ],
        "counts": {
            level: sum(counts[check] for check in CHECKS if _is(check, level)) for level in LEVELS
        },
        "checks": {check: {**asdict(row), "count": counts[check]} for check, row in CHECKS.items()},
        "findings": [_as_dict(finding) for finding in report.findings],
        "repairs": None if report.repairs is None else {k: report.repairs[k] for k in REPAIRS},
        "remaining": [_as_dict(finding) for finding in report.remaining],
    }


def _as_dict(finding: Finding) -> dict[str, Any]:
    given = {key: value for key, value in finding._asdict().items() if value is not None}
    return {**given, "level": finding.level}
