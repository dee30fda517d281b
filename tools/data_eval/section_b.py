"""Referring expressions: P@k by GIoU and by IoU

SPEC_DATA_EVAL section 2, ``b_refexp.json``.
"""

from __future__ import annotations

import re
from pathlib import Path

from fiber_d2.evaluation import expression_precision
from fiber_d2.evaluation.refexp import parse_expressions

from .common import Section, read_json

# "giou_0_5" or "plain_iou_0_5": the measure and its threshold.
_TABLE = re.compile(r"(?P<measure>giou|plain_iou)_(?P<whole>\d+)_(?P<fraction>\d+)")


def check(directory: Path) -> Section:
    section = Section("b")
    content = read_json(directory, "b_refexp.json")
    expressions = parse_expressions(content["gt"])
    for name, table in content["expected"].items():
        with section.case(name):
            match = _TABLE.fullmatch(name)
            if match is None:
                raise ValueError("no such measure is known")
            found = expression_precision(
                expressions,
                content["predictions"],
                topk=content["topk"],
                iou_thresh=float(f"{match['whole']}.{match['fraction']}"),
                generalized=match["measure"] == "giou",
            )
            # The original lists data sets without an expression, at 0; ours leaves them out.
            absent = {dataset: [0] * len(content["topk"]) for dataset in table}
            found = {**absent, **found}
            section.equal("data sets", sorted(found), sorted(table))
            for dataset in sorted(found.keys() & table.keys()):
                section.close(dataset, found[dataset], table[dataset], 1e-9)
    return section
