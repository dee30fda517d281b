"""``fiber-d2``: one program for looking, training, scoring, checking and converting."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

PROGRAM = "fiber-d2"
# Name: what help says of it.
COMMANDS = {
    "predict": "find what is asked for in images and videos",
    "demo": "a page in the browser: a picture, a text, and the boxes that belong to its words",
    "train": "train a model (as train_net.py)",
    "eval": "score a model on test sets (as train_net.py --eval-only)",
    "validate": "check a data set before it costs a training run",
    "convert": "checkpoints and yaml files of the original FIBER to ours, or starts for training",
    "export": "a model as ONNX or torch.export files, for other programs",
    "info": "versions, devices and operators: the first thing to paste into a bug report",
}
EPILOG = """examples:
  fiber-d2 info
  fiber-d2 train quickstart
  fiber-d2 predict photo.jpg --classes cat dog "traffic light" --config C --weights W.pth
  fiber-d2 predict photos/ --expression "the man left of the tree" --config C --weights W.pth
  fiber-d2 eval eval/custom_coco train.init_checkpoint=W.pth
  fiber-d2 validate --coco-json annotations.json --image-root images
  fiber-d2 convert from-fiber original.pth ours.pth
`fiber-d2 COMMAND --help` tells more of each. Exit status: 0 fine, 1 failed, 2 a mistake in the
command or the data.
"""
TRAIN_EPILOG = """examples:
  fiber-d2 train quickstart
  fiber-d2 train quickstart --resume train.max_iter=2000
  fiber-d2 train finetune/custom_coco data.train_json=T.json data.val_json=V.json \\
      data.image_root=IMAGES
  fiber-d2 train my_recipe.py --import my_datasets.py --num-gpus 8
  fiber-d2 train quickstart --num-gpus 2 train.device=cpu        # two processes on the CPU
NAME is a file, or a recipe that comes with fiber_d2: `fiber-d2 info --json` lists them under
"configs". docs/training.md tells what is logged, docs/scaling.md of several machines.
"""
EVAL_EPILOG = """examples:
  fiber-d2 eval quickstart train.init_checkpoint=output/quickstart/model_final.pth
  fiber-d2 eval eval/custom_coco train.init_checkpoint=W.pth data.json=V.json data.image_root=IMAGES
  fiber-d2 eval eval/lvis_minival --num-gpus 8 train.init_checkpoint=W.pth
  fiber-d2 eval eval/custom_coco --import my_datasets.py dataloader.test.dataset=NAME \\
      train.init_checkpoint=W.pth
NAME is a file, or a recipe that comes with fiber_d2: `fiber-d2 info --json` lists them under
"configs". docs/evaluation.md tells what is measured and which files are written.
"""


def build_parser() -> argparse.ArgumentParser:
    """For help and for mistakes: each command reads its own arguments."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="FIBER: boxes tied to words.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Its exit status; ``train`` and ``eval`` exit by themselves where it is not 0.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        build_parser().parse_args(argv)
        # argparse takes abbreviations of commands in some versions.
        build_parser().error(f"unknown command {argv[0]!r}")
    name, rest = argv[0], argv[1:]
    prog = f"{PROGRAM} {name}"
    if name in ("train", "eval"):
        return _run_engine(rest, prog, eval_only=name == "eval")
    # Only what the command needs is imported.
    module = importlib.import_module(f"fiber_d2.commands.{name}")
    if hasattr(module, "prepare_process"):
        module.prepare_process()
    return module.main(rest, prog)


def _run_engine(argv: list[str], prog: str, *, eval_only: bool) -> int:
    """A leading name of a configuration stands for ``--config-file``."""
    from fiber_d2.engine import main as engine
    from fiber_d2.predictor_settings import find_config

    if argv and not argv[0].startswith("-") and "=" not in argv[0]:
        try:
            argv = ["--config-file", find_config(argv[0]), *argv[1:]]
        except FileNotFoundError as error:
            sys.stderr.write(f"{prog}: error: {error}\n")
            return 2
    usage = f"{prog} NAME|--config-file FILE [options] [key=value ...]"
    epilog = EVAL_EPILOG if eval_only else TRAIN_EPILOG
    parser = engine.build_argument_parser(prog, usage, epilog)
    engine.main([*(["--eval-only"] if eval_only else []), *argv], prog, parser)
    return 0
