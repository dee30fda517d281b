"""Does this project compute what the original computed?

    python tools/check_parity.py FIXTURE.npz ... [--json OUT] [--threads N]

Builds FIBER-B in the variant of the file (v2 or v3), fills it with the file's reference weights
under the original's names, runs every case of the file and compares every array. Exit status 0:
all within tolerance; 1: some are not, or no check covers them; 2: not such a file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parity.compare import Row, as_text, compare  # noqa: E402
from parity.compute import eval_arrays, general_arrays, unit_arrays  # noqa: E402
from parity.fixture import Fill, Fixture, FixtureError, find_fill, load_fill  # noqa: E402
from parity.model import build_model, check_names, fill_model  # noqa: E402
from parity.training import requires_grad_array, train_arrays  # noqa: E402

from fiber_d2.modeling import FIBER  # noqa: E402


def run_cases(fixture: Fixture, model: FIBER, fill: Fill) -> tuple[dict, list[str]]:
    """Every array this tool can compute for a file, and remarks about accepted differences."""
    check_names(model, fixture)
    unused = fill_model(model, fill)
    found = general_arrays(fixture, model, fill)
    found["param_requires_grad"] = requires_grad_array(fixture, model)
    if "dyconv_unit/seed" in fixture.arrays:
        found.update(unit_arrays(fixture, model))
    remarks = []
    for case in fixture.eval_cases:
        found.update(eval_arrays(fixture, model, fill, case))
    for case in fixture.train_cases:
        arrays, more = train_arrays(fixture, model, fill, case, unused)
        found.update(arrays)
        remarks.extend(more)
    return found, remarks


def check_file(path: Path, reference_fill: Path | None) -> tuple[list[Row], list[str], str]:
    """Rows, remarks and the variant of one file."""
    fixture = Fixture.read(path)
    fill = load_fill(find_fill(path, reference_fill))
    model = build_model(fixture)
    # The convolutions of oneDNN round up to twice as much as plain ones on some CPUs, and the
    # weights amplify that: what is judged here is the function, not the library.
    with torch.backends.mkldnn.flags(enabled=False):
        found, remarks = run_cases(fixture, model, fill)
    return compare(fixture, found), remarks, fixture.variant


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("fixtures", nargs="+", type=Path, metavar="FIXTURE.npz")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the tables there, too")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of torch; default: its own choice"
    )
    parser.add_argument(
        "--reference-fill",
        type=Path,
        metavar="PATH",
        help="reference_fill.py; default: the one next to the fixture, else that of the tests",
    )
    args = parser.parse_args(argv)
    if args.threads is not None:
        if args.threads < 1:
            parser.error("--threads must be at least 1")
        torch.set_num_threads(args.threads)
    report, failed = [], 0
    path = None
    try:
        for path in args.fixtures:
            start = time.perf_counter()
            rows, remarks, variant = check_file(path, args.reference_fill)
            seconds = time.perf_counter() - start
            bad = [row for row in rows if not row.ok]
            failed += len(bad)
            print(f"{path}: FIBER-B {variant}")
            print(as_text(rows))
            for remark in remarks:
                print(f"accepted tie: {remark}")
            print(
                f"{len(rows) - len(bad)} of {len(rows)} within tolerance, {seconds:.0f} s"
                + "".join(f"\n  outside: {row.array}" for row in bad)
            )
            report.append(
                {
                    "fixture": str(path),
                    "variant": variant,
                    "seconds": round(seconds, 1),
                    "ok": not bad,
                    "remarks": remarks,
                    "arrays": [_plain(row) for row in rows],
                }
            )
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"ok": not failed, "files": report}, indent=1) + "\n")
    except (FixtureError, OSError) as error:
        print(f"check_parity: error: {error}", file=sys.stderr)
        return 2
    except (ValueError, KeyError, IndexError) as error:
        # Arrays that are there but do not fit together.
        print(f"check_parity: error: {path}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _plain(row: Row) -> dict:
    """JSON knows no NaN and no infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row._asdict().items()
    }


if __name__ == "__main__":
    sys.exit(main())
