"""Few-shot fine-tuning by the protocol: several shots and seeds, each tested once, one table.

    python -m fiber_d2.engine.fewshot --dataset Aquarium --shots 1 3 5 10 --seeds 3 30 300 \
        train.init_checkpoint=PRETRAINED.pth

docs/fewshot.md explains it.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

import fiber_d2  # noqa: F401 - registers the built-in data sets
from fiber_d2.files import replacing

from .errors import INTERRUPTED_EXIT_CODE, ErrorReporter
from .fewshot_plan import (
    AUTO,
    DEFAULT_METRIC,
    FIRST,
    SELECTIONS,
    Splits,
    Training,
    datasets_module,
    find_splits,
    key_of_test_loader,
    plan_trainings,
    quoted,
)
from .fewshot_runs import Run, digest_of, execute, state_of_file
from .fewshot_table import make_rows, markdown_table, read_training, read_zero_shot, write_table
from .overrides import import_user_modules, load_config
from .resolve import config_text

PROGRAM = "fiber_d2.engine.fewshot"
# Not __name__, which is __main__ on the command line.
logger = logging.getLogger(PROGRAM)

DEFAULT_CONFIG = "configs/finetune/odinw_full.py"
_OVERRIDE = re.compile(r"\+{0,2}[A-Za-z_][\w.]*=.*", re.DOTALL)
# Of the recipe, what is a matter of taste or of the machine.
_INDIFFERENT = ("output_dir", "device", "threads", "timeout", "log_period", "pictures")

EPILOG = """examples:
  python -m fiber_d2.engine.fewshot --dataset Aquarium --shots 1 3 5 10 --seeds 3 30 300 \\
      --num-gpus 4 train.init_checkpoint=PRETRAINED.pth
  python -m fiber_d2.engine.fewshot --dataset mine --train-json T.json --val-json V.json \\
      --image-root IMAGES --config-file configs/finetune/fewshot_small.py

The same command goes on where an earlier one ended. key=value overrides come last, and go to every
training and evaluation.
"""


def build_argument_parser() -> argparse.ArgumentParser:
    """Of the command line, overrides apart."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        usage="%(prog)s --dataset NAME [options] [key=value ...]",
        description="Few-shot fine-tuning: train on K images per class, keep the checkpoint that "
        "is best on the validation split, test it once; for several K and seeds.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, help="data sets NAME_train, NAME_val[, NAME_test], a set of "
        "ODinW, or what to call your own files")  # fmt: skip
    add("--shots", type=int, nargs="+", default=[1, 3, 5, 10], metavar="K",
        help="images per class, 0 for all (default: 1 3 5 10)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[3, 30, 300], metavar="S",
        help="of the choice of images and of the training (default: 3 30 300)")  # fmt: skip
    add("--config-file", default=DEFAULT_CONFIG, metavar="FILE",
        help="the recipe, a .py file (default: %(default)s)")  # fmt: skip
    add("--output", metavar="DIR", help="default: output/fewshot/NAME")
    files = parser.add_argument_group("your own COCO json files")
    files.add_argument("--train-json", metavar="FILE")
    files.add_argument("--val-json", metavar="FILE")
    files.add_argument("--test-json", metavar="FILE", help="default: test on the validation file")
    files.add_argument("--image-root", metavar="DIR", help="of all files' images")
    protocol = parser.add_argument_group("protocol")
    add = protocol.add_argument
    add("--epochs", type=float, default=200, help="at most so many (default: 200)")
    add("--copies", type=int, metavar="N", help="how often an epoch shows each image (default: 8 "
        "times at 1 shot, 4 up to 3 shots, twice up to 5, once above)")  # fmt: skip
    add("--selection", choices=SELECTIONS, default=AUTO,
        help="of images: published files, drawn by the seed, or the first ones whatever the seed; "
        "auto takes published ones where they are on disk, else draws")  # fmt: skip
    add("--allow-fewer", action="store_true",
        help="put up with classes that have fewer images than shots")  # fmt: skip
    add("--metric", default=DEFAULT_METRIC, help="that chooses the best checkpoint, of the "
        "validation split (default: %(default)s)")  # fmt: skip
    add("--no-zero-shot", action="store_true", help="do not test the untrained checkpoint")
    add = parser.add_argument
    add("--keep", choices=("best", "all", "none"), default="best",
        help="which checkpoints of finished trainings stay (default: the best ones)")  # fmt: skip
    add("--num-gpus", type=int, default=1, metavar="N",
        help="processes of each training, on the CPU too (default: 1)")  # fmt: skip
    add("--import", dest="imports", action="append", default=[], metavar="MODULE_OR_FILE",
        help="import a module or a .py file that registers data sets; may be repeated")  # fmt: skip
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Options, and ``overrides``: the key=value at the end."""
    options = list(argv)
    overrides: list[str] = []
    while options and _OVERRIDE.fullmatch(options[-1]):
        overrides.insert(0, options.pop())
    args = build_argument_parser().parse_args(options)
    args.overrides = overrides
    args.output = Path(args.output or os.path.join("output", "fewshot", args.dataset))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the protocol; exits with 2 after a mistake the user can mend, with 1 after a failure."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    reporter = ErrorReporter(PROGRAM)
    reporter.note_output_dir(str(args.output))
    with reporter.exit_on_error():
        try:
            run_protocol(args)
        except KeyboardInterrupt:
            sys.stderr.write(f"{PROGRAM}: interrupted. The same command goes on from here.\n")
            sys.exit(INTERRUPTED_EXIT_CODE)


def run_protocol(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything that is not done yet; the rows of the table.

    Raises:
        FileNotFoundError, KeyError, ValueError: something given is wrong; found before training.
        RunError: a training or an evaluation failed.
    """
    imports, splits = register(args)
    cfg = load_recipe(args)
    trainings = plan_trainings(
        cfg,
        splits,
        shots=args.shots,
        seeds=args.seeds,
        epochs=args.epochs,
        copies=args.copies,
        selection=args.selection,
        allow_fewer=args.allow_fewer,
        metric=args.metric,
    )
    make = partial(make_run, args, cfg, imports)
    runs = [(training, make(training, training_overrides(cfg, training))) for training in trainings]
    zero_shot = None if args.no_zero_shot else make(None, zero_shot_overrides(cfg, splits))
    for run in [*(run for _, run in runs), *([zero_shot] if zero_shot else [])]:
        # All of them now: what is refused must not be refused after hours.
        run.note()
    setup_logger(str(args.output), name="fiber_d2", color=sys.stdout.isatty())
    describe(args, splits, runs, zero_shot is not None)

    tested = None
    if zero_shot:
        tested = do_run(zero_shot, partial(read_zero_shot, splits.test), args.keep)["test"]
    results: dict[tuple[int, int], dict[str, Any]] = {}
    pace = Pace([run for _, run in runs])
    about = {
        "dataset": args.dataset,
        "splits": asdict(splits),
        "config_file": args.config_file,
        "overrides": args.overrides,
        "epochs": args.epochs,
        "metric": args.metric,
    }
    for training, run in runs:
        cell = do_run(run, partial(read_training, splits.test), args.keep, pace)
        more = {"images": training.num_images, "selection": training.selection}
        results[training.shots, training.seed] = {**cell, **more}
        rows = make_rows(tested, args.shots, results)
        write_table(args.output, about, rows, complete=len(results) == len(runs))
    logger.info("%s\n%s", args.output / "table.md", markdown_table(rows))
    return rows


def register(args: argparse.Namespace) -> tuple[list[str], Splits]:
    """Register the data sets here; modules to import in every run, and the splits."""
    imports = [os.path.abspath(x) if x.endswith(".py") else x for x in args.imports]
    import_user_modules(imports)
    given = (args.train_json, args.val_json, args.image_root)
    if not any((*given, args.test_json)):
        return imports, find_splits(args.dataset)
    if not all(given):
        raise ValueError(
            "One's own data need --train-json, --val-json and --image-root; --test-json may be "
            "given, too."
        )
    files = {"train": args.train_json, "val": args.val_json, "test": args.test_json}
    path = args.output / "datasets.py"
    text = datasets_module(
        args.dataset, {split: (name, args.image_root) for split, name in files.items() if name}
    )
    with replacing(path) as file:
        file.write(text.encode())
    path = path.absolute()
    import_user_modules([str(path)])
    test = f"{args.dataset}_{'test' if args.test_json else 'val'}"
    return [*imports, str(path)], Splits(f"{args.dataset}_train", f"{args.dataset}_val", test)


def load_recipe(args: argparse.Namespace) -> DictConfig:
    """The recipe with the user's overrides.

    Raises:
        FileNotFoundError: the checkpoint to start from does not exist.
        ValueError: it is no recipe for this, or names no checkpoint.
    """
    cfg = load_config(args.config_file, args.overrides)
    if not isinstance(cfg, DictConfig) or "optimizer" not in cfg:
        raise ValueError(
            f"{args.config_file} is no recipe of a training: give a .py file such as "
            f"{DEFAULT_CONFIG}."
        )
    key_of_test_loader(cfg)
    checkpoint = cfg.train.init_checkpoint
    if not checkpoint:
        raise ValueError(
            "Few-shot training starts from a trained model: give train.init_checkpoint=FILE.pth."
        )
    if "://" not in checkpoint and not os.path.isfile(checkpoint):
        raise FileNotFoundError(
            f"The checkpoint {checkpoint} does not exist: give another train.init_checkpoint."
        )
    return cfg


def training_overrides(cfg: DictConfig, training: Training) -> tuple[str, ...]:
    """What makes the recipe a training of the protocol; early stop where it has none."""
    stop = () if cfg.train.get("early_stop") else ("train.early_stop={patience:8}",)
    return (*training.overrides, *stop, "train.pictures=0")


def zero_shot_overrides(cfg: DictConfig, splits: Splits) -> tuple[str, ...]:
    """What makes the recipe an evaluation of the checkpoint it starts from."""
    return (f"{key_of_test_loader(cfg)}.dataset={quoted(splits.test)}", "train.pictures=0")


def make_run(
    args: argparse.Namespace,
    cfg: DictConfig,
    imports: Sequence[str],
    training: Training | None,
    overrides: Sequence[str],
) -> Run:
    """The call of the training program; without ``training`` an evaluation."""
    folder = args.output / (training.name if training else "zero_shot")
    everything = (*overrides, *args.overrides, f"train.output_dir={quoted(str(folder))}")
    arguments = ["--config-file", args.config_file, "--num-gpus", str(args.num_gpus)]
    for name in imports:
        arguments += ["--import", name]
    if training is None:
        arguments.append("--eval-only")
    complete = load_config(args.config_file, everything)
    checkpoint = complete.train.init_checkpoint
    for name in _INDIFFERENT:
        complete.train[name] = None
    settings = {
        "recipe": digest_of(config_text(complete)),
        "data": [Path(name).read_text() for name in imports if name.endswith(".py")],
        "checkpoint": checkpoint if "://" in checkpoint else state_of_file(checkpoint),
    }
    return Run(
        training.title if training else "zero-shot",
        folder,
        (*arguments, *everything),
        settings,
        int(complete.train.max_iter) if training else 0,
    )


class Pace:
    """How long what is left will take, by the iterations of what is done.

    Trainings that stop early make it an estimate.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._left = {run.title: run.max_iter for run in runs}
        self._iterations, self._seconds = 0, 0.0

    def note(self, run: Run, seconds: float) -> None:
        """A run is done that took so long."""
        self._iterations += self._left.pop(run.title, 0)
        self._seconds += seconds

    def describe(self) -> str:
        """What is left."""
        if not self._left or not self._iterations:
            return f"{len(self._left)} to go"
        seconds = sum(self._left.values()) * self._seconds / self._iterations
        return f"{len(self._left)} to go, about {timedelta(seconds=round(seconds))}"


def do_run(run: Run, collect: Any, keep: str, pace: Pace | None = None) -> dict[str, Any]:
    """The results of a run, which is done unless it has been before."""
    found = run.results
    known = found is not None
    if not known:
        logger.info("%s: begins; its log is %s", run.title, run.folder / "log.txt")
        found = execute(run, collect, keep=keep)
    if pace is not None:
        pace.note(run, found["seconds"])
    logger.info(
        "%s: %sAP %s%s%s",
        run.title,
        "finished before, " if known else "",
        _shown(found["test"].get(DEFAULT_METRIC)),
        f" after {found['iterations']} iterations" if "iterations" in found else "",
        f"; {pace.describe()}" if pace else "",
    )
    return found


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def describe(
    args: argparse.Namespace,
    splits: Splits,
    runs: Sequence[tuple[Training, Run]],
    zero_shot: bool,
) -> None:
    """What is going to be done."""
    logger.info(
        "%d trainings%s: train on %s, choose by %s of %s, test on %s; output in %s",
        len(runs),
        " and a zero-shot test" if zero_shot else "",
        splits.train,
        args.metric,
        splits.val,
        splits.test,
        args.output,
    )
    for training, run in runs:
        logger.info(
            "%s: %d images%s, at most %d iterations",
            training.title,
            training.num_images,
            f" ({training.selection})" if training.selection else "",
            run.max_iter,
        )
    if args.selection == FIRST and len(args.seeds) > 1:
        logger.warning("--selection first: all seeds train on the same images.")
    if splits.tests_on_val:
        logger.warning(
            "There is no test split: results on %s, by which checkpoints are chosen, are "
            "optimistic.",
            splits.val,
        )


if __name__ == "__main__":
    main()
