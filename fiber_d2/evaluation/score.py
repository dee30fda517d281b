"""``python -m fiber_d2.evaluation score``: the numbers of saved predictions, without a model."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.evaluation import DatasetEvaluator
from tabulate import tabulate

from fiber_d2.data import register_coco_json
from fiber_d2.evaluation.build import build_evaluator
from fiber_d2.evaluation.settings import describe_evaluator, library_versions, without_nan
from fiber_d2.files import save_json

_ERRORS = (ValueError, KeyError, FileNotFoundError, ModuleNotFoundError)
# Arguments of evaluators that are settled here.
_SETTLED = ("dataset_name", "output_dir", "distributed")

DESCRIPTION = """Score predictions that an evaluation has saved beside its results.json
(coco_instances_results.json, flickr_predictions.json, refexp_predictions.json, ...). The numbers
are those of the evaluation, if the options of its evaluator are the same."""


def score_predictions(
    predictions: str, dataset: str, options: Mapping[str, Any] | None = None
) -> tuple[dict[str, dict[str, float]], DatasetEvaluator]:
    """Score a file of predictions.

    Args:
        predictions: as an evaluator of the data set has saved it.
        dataset: registered data set.
        options: arguments of the evaluator; "iou" stands for ``iou_thresh``.

    Returns:
        Results as of the evaluator, and the evaluator.

    Raises:
        KeyError: the data set is not registered.
        FileNotFoundError: predictions or ground truth do not exist.
        ValueError: predictions of another data set or form, or an option that there is not.
    """
    given = {"iou_thresh" if key == "iou" else key: x for key, x in (options or {}).items()}
    for name in given:
        if name in _SETTLED:
            raise ValueError(f"The evaluator of {dataset!r} has no option {name!r} here.")
    evaluator = build_evaluator(dataset, distributed=False, **given)
    if not hasattr(evaluator, "score_file"):
        raise ValueError(
            f"{type(evaluator).__name__}, the evaluator of {dataset!r}, cannot score a file: it "
            "has no score_file(path)."
        )
    return evaluator.score_file(predictions), evaluator


def build_argument_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m fiber_d2.evaluation``."""
    parser = argparse.ArgumentParser(prog="python -m fiber_d2.evaluation")
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser(
        "score", description=DESCRIPTION, help="score saved predictions without a model"
    )
    score.add_argument("predictions", metavar="PREDICTIONS.json")
    score.add_argument("--dataset", required=True, metavar="NAME", help="name in the catalogue")
    score.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="import a module or a .py file that registers data sets; may be repeated",
    )
    score.add_argument(
        "--json-file",
        metavar="GT.json",
        help="ground truth in COCO's format; registers it under NAME",
    )
    score.add_argument(
        "--image-root", default="", metavar="DIR", help="its images (they are not read)"
    )
    score.add_argument(
        "--plots",
        metavar="DIR",
        help="draw precision over recall and AP of each class there (COCO's and LVIS's measures)",
    )
    score.add_argument("--output", metavar="FILE.json", help="write results and protocol there")
    score.add_argument("--iou", type=float, help="IoU from which on a box hits")
    score.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another argument of the evaluator, such as topk=[1,5] or max_dets_per_image=300; "
        "may be repeated",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 after a mistake, with one line on stderr."""
    args = build_argument_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        _import_all(args.imports)
        if args.json_file is not None:
            register_coco_json(args.dataset, args.json_file, args.image_root)
        results, evaluator = score_predictions(args.predictions, args.dataset, _options(args))
        protocol = {
            "dataset": args.dataset,
            "predictions": str(args.predictions),
            **describe_evaluator(evaluator),
            "versions": library_versions(),
        }
        if args.output:
            content = {"protocol": protocol, "results": without_nan(results)}
            save_json(content, Path(args.output))
        plots = _plot(evaluator, args.plots, args.dataset) if args.plots else []
    except _ERRORS as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.stderr.write(f"error: {text}\n")
        return 2
    sys.stdout.write(f"{args.dataset}: {protocol['metric']}\n")
    for task, numbers in results.items():
        table = tabulate(numbers.items(), headers=[task, "value"], floatfmt=".4f")
        sys.stdout.write(f"{table}\n")
    if args.output:
        sys.stdout.write(f"Results: {args.output}\n")
    for path in plots:
        sys.stdout.write(f"Plot: {path}\n")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = {} if args.iou is None else {"iou": args.iou}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text}: write KEY=VALUE.")
        try:
            options[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--option {text}: the value cannot be read.") from error
    return options


def _plot(evaluator: DatasetEvaluator, folder: str, title: str) -> list[Path]:
    curves = getattr(evaluator, "curves", None)
    if curves is None:
        raise ValueError(
            f"--plots: {type(evaluator).__name__}, the evaluator of {title!r}, measures no "
            "precision over recall."
        )
    # Drawing needs matplotlib, which scoring does not.
    from fiber_d2.plots import save_plots

    return save_plots(curves, folder, title=title)


def _import_all(names: Sequence[str]) -> None:
    if names:
        # The engine is not needed otherwise.
        from fiber_d2.engine.overrides import import_user_modules

        import_user_modules(names)
