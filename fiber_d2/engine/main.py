"""The command line: parse, check the configuration, start the processes."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from omegaconf import DictConfig

import fiber_d2  # noqa: F401 - fills the registries

from .default_trainer import PICTURES, run_cfg_node
from .errors import INTERRUPTED_EXIT_CODE, ErrorReporter
from .evaluate import EvaluationOptions
from .inference import EvaluationInterrupted
from .launch import DEFAULT_TIMEOUT, Placement, choose_device, launch, read_placement
from .overrides import import_user_modules, load_config
from .pictures import BEST_WORST, SPREAD
from .preemption import listening, passing_on
from .processes import interrupt_children, notice_lost_contact
from .resolve import config_text, resolve_config
from .train import run_lazy_config

PROGRAM = "fiber-d2-train"

# Of the processes of a run, by the names that argparse gives them.
LAUNCH_OPTIONS = ("num_gpus", "num_machines", "machine_rank", "dist_url")

EPILOG = """examples:
  train_net.py --config-file configs/quickstart.py
  train_net.py --config-file configs/quickstart.py --resume train.max_iter=2000
  train_net.py --config-file configs/quickstart.py --eval-only train.init_checkpoint=model.pth
  train_net.py --config-file configs/FIBER-B.yaml --num-gpus 8 SOLVER.BASE_LR 0.0001
  train_net.py --config-file C --num-gpus 2 train.device=cpu      (two processes on the CPU)
  train_net.py --config-file C --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
  torchrun --nproc-per-node 8 train_net.py --config-file C
docs/scaling.md has more of several machines, torchrun and Slurm.
"""


def build_argument_parser(
    prog: str | None = None, usage: str | None = None, epilog: str = EPILOG
) -> argparse.ArgumentParser:
    """Detectron2's parser, with ``--import`` and a free port by default.

    Args:
        prog: what help and usage call the program.
        usage: its first lines, where argparse's own would not do.
        epilog: its last lines.
    """
    parser = default_argument_parser(epilog=epilog)
    parser.prog, parser.usage = prog or parser.prog, usage
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="import a module or a .py file that registers data sets; may be repeated",
    )
    parser.add_argument(
        "--skip-self-check",
        action="store_true",
        help="do not check prompts and ground truth of the test sets before computing",
    )
    parser.add_argument(
        "--skip-start-check",
        action="store_true",
        help="do not check training data, one step, memory and schedule before training",
    )
    parser.add_argument(
        "--vis",
        type=_count,
        metavar="N",
        help="draw the N best and the N worst images of each test set (default: the first ones, "
        "as train.pictures says)",
    )
    parser.add_argument(
        "--resume-eval",
        action="store_true",
        help="with --eval-only: go on from the predictions of an evaluation that was interrupted",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the configuration with all overrides and references resolved, and exit",
    )
    parser.add_argument(
        "--dist-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="how long processes wait for each other, at the start and in each collective "
        "operation (default: train.timeout)",
    )
    # None where they are not given: torchrun decides them.
    parser.set_defaults(**dict.fromkeys(LAUNCH_OPTIONS))
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def main(
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    parser: argparse.ArgumentParser | None = None,
) -> None:
    """Run the program; exits with 2 after a mistake the user can mend, with 1 after a failure.

    Args:
        prog: what messages begin with.
        parser: of :func:`build_argument_parser`, with words of its own.
    """
    args = (parser or build_argument_parser(prog)).parse_args(argv)
    args.program = prog or PROGRAM
    # For the processes to come, as train_net.py has it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    reporter = ErrorReporter(args.program, mp.get_context("spawn").Semaphore(1))
    with reporter.exit_on_error(), _exit_on_interrupt(args, reporter, parent=True), passing_on():
        # Before any process starts: most mistakes are here.
        placement = read_placement(os.environ)
        cfg, device, num_processes = prepare(args, reporter, placement)
        if args.print_config:
            resolve_config(cfg, eval_only=args.eval_only)
            sys.stdout.write(config_text(cfg))
            return
        try:
            launch(
                run,
                num_processes=num_processes,
                num_machines=1 if args.num_machines is None else args.num_machines,
                machine_rank=args.machine_rank or 0,
                dist_url=args.dist_url or "auto",
                device=device,
                args=(args, reporter.first, placement),
                timeout=choose_timeout(cfg, args.dist_timeout),
                placement=placement,
            )
        except mp.ProcessExitedException as error:
            if error.exit_code > 0:
                # The process has said why.
                sys.exit(error.exit_code)
            raise


def prepare(
    args: argparse.Namespace, reporter: ErrorReporter, placement: Placement | None = None
) -> tuple[Any, str, int]:
    """Configuration, device and number of processes of a run.

    Args:
        placement: where a launcher has started this process.
    """
    if args.resume_eval and not args.eval_only:
        raise ValueError("--resume-eval goes with --eval-only; --resume goes on with a training.")
    import_user_modules(args.imports)
    cfg = load_config(args.config_file, args.opts, on_loaded=reporter.note_output_dir)
    lazy = isinstance(cfg, DictConfig)
    requested = cfg.train.device if lazy else cfg.MODEL.DEVICE
    if placement is None:
        number = 1 if args.num_gpus is None else args.num_gpus
        device, num_processes = choose_device(requested, number)
    else:
        _check_options_of_launcher(args)
        number = placement.local_world_size
        device, num_processes = choose_device(requested, number, option="--nproc-per-node")
    if lazy:
        cfg.train.device = device
        # train.output_dir=1 is a number to the parser of overrides.
        cfg.train.output_dir = str(cfg.train.output_dir)
        if args.skip_self_check:
            cfg.train.self_check = False
        if args.skip_start_check:
            cfg.train.start_check = False
        if args.vis is not None:
            cfg.train.pictures, cfg.train.pictures_of = args.vis, BEST_WORST
        if args.resume_eval:
            cfg.train.resume_eval = True
    else:
        cfg.defrost()
        cfg.MODEL.DEVICE = device
        if args.skip_start_check:
            cfg.FIBER.TRAIN.START_CHECK = False
        cfg.freeze()
    return cfg, device, num_processes


def _check_options_of_launcher(args: argparse.Namespace) -> None:
    given = [name for name in LAUNCH_OPTIONS if getattr(args, name) is not None]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise ValueError(
            f"torchrun (or a launcher that sets RANK and WORLD_SIZE as it does) has started this "
            f"process, but {option} is given, too: leave it out, torchrun has --nproc-per-node, "
            "--nnodes, --node-rank and --rdzv-endpoint; or start the program without torchrun."
        )


def choose_timeout(cfg: Any, seconds: float | None) -> timedelta:
    """Of ``--dist-timeout``, else of the configuration.

    Raises:
        ValueError: the configuration's is not a positive number.
    """
    if seconds is None:
        lazy = isinstance(cfg, DictConfig)
        name = "train.timeout" if lazy else "FIBER.TRAIN.TIMEOUT"
        seconds = (
            cfg.train.get("timeout", DEFAULT_TIMEOUT.total_seconds())
            if lazy
            else cfg.FIBER.TRAIN.TIMEOUT
        )
        if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise ValueError(f"{name} is {seconds!r}, but it is a positive number of seconds.")
    return timedelta(seconds=seconds)


def run(args: argparse.Namespace, first: Any, placement: Placement | None = None) -> None:
    """What each process does."""
    reporter = ErrorReporter(args.program, first)
    with reporter.exit_on_error(outermost=False), _exit_on_interrupt(args, reporter), listening():
        cfg, _, _ = prepare(args, reporter, placement)
        with notice_lost_contact():
            _run(cfg, args)


def _run(cfg: Any, args: argparse.Namespace) -> None:
    if isinstance(cfg, CfgNode):
        options = EvaluationOptions(
            pictures=PICTURES if args.vis is None else args.vis,
            pictures_of=SPREAD if args.vis is None else BEST_WORST,
            self_check=not args.skip_self_check,
            resume=args.resume_eval,
        )
        run_cfg_node(cfg, resume=args.resume, eval_only=args.eval_only, options=options)
    else:
        run_lazy_config(cfg, resume=args.resume, eval_only=args.eval_only)


@contextmanager
def _exit_on_interrupt(
    args: argparse.Namespace, reporter: ErrorReporter, *, parent: bool = False
) -> Iterator[None]:
    """After Ctrl-C, one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        if parent:
            # Without its terminal a program is told alone: its processes have to know.
            interrupt_children()
        if reporter.is_first():
            if isinstance(error, EvaluationInterrupted):
                hint = str(error)
            else:
                option = "--resume-eval" if args.eval_only else "--resume"
                hint = f"The same command with {option} goes on from what is saved."
            sys.stderr.write(f"{args.program}: interrupted. {hint}\n")
            sys.stderr.flush()
        sys.exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    main()
