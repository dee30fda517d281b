"""The command line: parse, check the configuration, start the processes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from omegaconf import DictConfig

import fiber_d2  # noqa: F401 - fills the registries

from .default_trainer import run_cfg_node
from .errors import ErrorReporter
from .launch import choose_device, launch
from .overrides import import_user_modules, load_config
from .train import run_lazy_config

PROGRAM = "fiber-d2-train"

EPILOG = """examples:
  train_net.py --config-file configs/quickstart.py
  train_net.py --config-file configs/quickstart.py --resume train.max_iter=2000
  train_net.py --config-file configs/quickstart.py --eval-only train.init_checkpoint=model.pth
  train_net.py --config-file configs/FIBER-B.yaml --num-gpus 8 SOLVER.BASE_LR 0.0001
  train_net.py --config-file C --num-gpus 2 train.device=cpu      (two processes on the CPU)
  train_net.py --config-file C --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
"""


def build_argument_parser() -> argparse.ArgumentParser:
    """Detectron2's parser, with ``--import`` and a free port by default."""
    parser = default_argument_parser(epilog=EPILOG)
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE",
        help="import a module or a .py file that registers data sets; may be repeated",
    )
    parser.set_defaults(dist_url="auto")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; exits with 2 after a mistake the user can mend, with 1 after a failure."""
    args = build_argument_parser().parse_args(argv)
    reporter = ErrorReporter(PROGRAM, mp.get_context("spawn").Event())
    with reporter.exit_on_error():
        # Before any process starts: most mistakes are here.
        cfg, device, num_processes = prepare(args, reporter)
        try:
            launch(
                run,
                num_processes=num_processes,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                device=device,
                args=(args, reporter.first),
            )
        except mp.ProcessExitedException as error:
            if error.exit_code > 0:
                # The process has said why.
                sys.exit(error.exit_code)
            raise


def prepare(args: argparse.Namespace, reporter: ErrorReporter) -> tuple[Any, str, int]:
    """Configuration, device and number of processes of a run."""
    import_user_modules(args.imports)
    cfg = load_config(args.config_file, args.opts, on_loaded=reporter.note_output_dir)
    lazy = isinstance(cfg, DictConfig)
    device, num_processes = choose_device(
        cfg.train.device if lazy else cfg.MODEL.DEVICE, args.num_gpus
    )
    if lazy:
        cfg.train.device = device
        # train.output_dir=1 is a number to the parser of overrides.
        cfg.train.output_dir = str(cfg.train.output_dir)
    else:
        cfg.defrost()
        cfg.MODEL.DEVICE = device
        cfg.freeze()
    return cfg, device, num_processes


def run(args: argparse.Namespace, first: Any) -> None:
    """What each process does."""
    reporter = ErrorReporter(PROGRAM, first)
    with reporter.exit_on_error():
        cfg, _, _ = prepare(args, reporter)
        program = run_cfg_node if isinstance(cfg, CfgNode) else run_lazy_config
        program(cfg, resume=args.resume, eval_only=args.eval_only)


if __name__ == "__main__":
    main()
