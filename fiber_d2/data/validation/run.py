"""All checks of some data sets, one after the other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from fiber_d2.data.builtin import DETECTION

from .boxes import check_boxes
from .captions import check_captions
from .checks import CHECKS, ERROR, Finding
from .classes import check_classes
from .image_files import Facts, ImageFact, read_images
from .images import check_duplicates, check_images, check_paths
from .records import read_record_contents
from .schema import read_json_contents
from .sources import Contents, Source


@dataclass
class Report:
    """What has been found.

    Attributes:
        findings: of all sources.
        stopped: why the checks did not come to their end, None where they did.
        contents: what was checked of each source, in their order.
        facts: of the image files of all sources.
        repairs: how often each repair was made; None where none was asked for.
        remaining: errors of the repaired copy.
    """

    sources: list[Source]
    findings: list[Finding] = field(default_factory=list)
    stopped: str | None = None
    contents: list[Contents] = field(default_factory=list)
    facts: dict[Hashable, ImageFact] = field(default_factory=dict)
    repairs: Counter[str] | None = None
    remaining: list[Finding] = field(default_factory=list)

    def counts(self) -> Counter[str]:
        """Number of findings of each check."""
        return Counter(finding.check for finding in self.findings)

    @property
    def has_errors(self) -> bool:
        return any(CHECKS[check].level == ERROR for check in self.counts())


@dataclass(frozen=True)
class Options:
    """How to validate.

    Attributes:
        tokenizer: of the prompts.
        max_tokens: limit of a caption's tokens, special tokens included.
        separator: stands between the classes of a detection caption.
        workers: processes that read images; None for one per core, 0 for none.
        read_images: whether image files are looked at.
    """

    tokenizer: PreTrainedTokenizerFast
    max_tokens: int = 256
    separator: str = ". "
    workers: int | None = None
    read_images: bool = True


def validate(sources: Sequence[Source], options: Options, also: Sequence[Source] = ()) -> Report:
    """Check data sets, and whether they share images.

    Nothing that is wrong with the data raises; Ctrl-C ends it with what was found so far.

    Args:
        also: further splits, only compared with the others for shared images.
    """
    report = Report(list(sources))
    try:
        for finding in _all(report, options, also):
            report.findings.append(finding)
    except KeyboardInterrupt:
        report.stopped = "interrupted"
    except BrokenProcessPool:
        report.stopped = "a process that reads images died (out of memory? try fewer --workers)"
    return report


def _all(report: Report, options: Options, also: Sequence[Source]) -> Iterator[Finding]:
    for source in report.sources:
        report.contents.append(Contents())
        report.contents[-1] = read_contents(source)
        yield from _of(source, _cheap(source, report.contents[-1], options))
    workers = (os.cpu_count() or 1) if options.workers is None else options.workers
    if options.read_images:
        for source, contents in zip(report.sources, report.contents):
            try:
                read_images(contents.images, source, report.facts, workers=workers)
            finally:  # of what was read before an interruption, too
                found = check_images(contents.images, source, report.facts)
                report.findings.extend(_of(source, found))
    splits = [(source, c.images) for source, c in zip(report.sources, report.contents)]
    for source in also:
        images = read_contents(source).images
        if options.read_images:
            read_images(images, source, report.facts, workers=workers, only_digest=True)
        splits.insert(0, (source, images))
    others = {source.label for source in also}
    yield from (f for f in check_duplicates(splits, report.facts) if f.source not in others)


def read_contents(source: Source) -> Contents:
    """The images with their annotations, and what is wrong with the structure."""
    if source.broken is not None:
        return Contents(findings=[Finding("json", source.broken)])
    return read_json_contents(source) if source.records is None else read_record_contents(source)


def _of(source: Source, findings: Iterable[Finding]) -> Iterator[Finding]:
    for finding in findings:
        yield finding._replace(source=source.label)


def _cheap(source: Source, contents: Contents, options: Options) -> Iterator[Finding]:
    """All but the image files."""
    yield from contents.findings
    yield from check_paths(contents.images, source)
    yield from check_boxes(contents.items)
    if source.kind == DETECTION:
        yield from check_classes(
            source, contents.classes, options.tokenizer, options.max_tokens, options.separator
        )
    else:
        yield from check_captions(
            contents.items, source.kind, options.tokenizer, options.max_tokens
        )


def errors_after_repair(
    source: Source, repaired: Any, facts: Facts, options: Options
) -> list[Finding]:
    """The errors of a repaired copy; image files are not read again."""
    source = replace(source, content=repaired)
    contents = read_contents(source)
    findings = [
        *_cheap(source, contents, options),
        *check_images(contents.images, source, facts),
    ]
    return [f for f in _of(source, findings) if f.level == ERROR]
