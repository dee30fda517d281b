"""Convert checkpoints and configurations of the original FIBER, or make one to start from.

    fiber-d2 convert from-fiber ORIGINAL.pth OUT.pth [--ema]
    fiber-d2 convert to-fiber OURS.pth OUT.pth [--like ORIGINAL.pth]
    fiber-d2 convert initialize OUT.pth --config-file C [--swin F] [--roberta F]
                                        [--fiber F] [key=value ...]
    fiber-d2 convert config BASE.yaml [TASK.yaml ...] [--output RECIPE.py] [KEY VALUE ...]

`python tools/convert_checkpoint.py` is the same. The output is complete or absent. Exit status 2
and one message if something is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from fiber_d2 import original_config
from fiber_d2.checkpoint import (
    convert_fiber_state_dict,
    export_fiber_state_dict,
    initialize_from_fiber,
    initialize_from_roberta,
    initialize_from_swin,
    is_fiber_state_dict,
    read_fiber_checkpoint,
)
from fiber_d2.checkpoint.files import (
    read_file,
    resolve_checkpoint_path,
    state_dict_of,
)
from fiber_d2.engine.durable import write_atomically
from fiber_d2.engine.errors import EXPECTED_ERRORS, USAGE_EXIT_CODE, PlainRunError, message_of


def from_fiber(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    weights = read_fiber_checkpoint(args.source, use_ema=args.ema)
    return convert_fiber_state_dict(weights)


def to_fiber(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    path = resolve_checkpoint_path(args.source)
    weights = state_dict_of(read_file(path), path)
    if is_fiber_state_dict(weights):
        raise ValueError(f"{path} has the original's names already.")
    carried = read_fiber_checkpoint(args.like) if args.like else None
    return export_fiber_state_dict(
        weights,
        carried=carried,
        anchor_strides=args.anchor_strides,
        anchor_sizes=args.anchor_sizes,
    )


def initialize(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    sources = ((args.swin, initialize_from_swin), (args.roberta, initialize_from_roberta))
    if args.fiber and (args.swin or args.roberta):
        raise ValueError("--fiber covers both towers: give it without --swin and --roberta.")
    if not (args.fiber or args.swin or args.roberta):
        raise ValueError("Name what to start from: --swin, --roberta or --fiber.")
    from detectron2.config import CfgNode, instantiate
    from detectron2.modeling import build_model

    from fiber_d2.engine.overrides import load_config

    cfg = load_config(args.config_file, args.opts)
    if isinstance(cfg, CfgNode):
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
    else:
        model = instantiate(cfg.model)
    for path, function in (*sources, (args.fiber, initialize_from_fiber)):
        if path:
            result = function(model, path)
            sys.stdout.write(
                f"{path}: {len(result.loaded)} entries, {len(result.resized)} of them interpolated "
                f"to another window; {len(result.dropped)} dropped; {len(result.kept)} of the "
                "model keep their initial values\n"
            )
    return model.state_dict()


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("from-fiber", help="the original's file to ours")
    command.add_argument("source", help=".pth file, last_checkpoint file, or its folder")
    command.add_argument("output")
    command.add_argument("--ema", action="store_true", help="the averaged weights (model_ema)")
    command.set_defaults(function=from_fiber)

    command = commands.add_parser("to-fiber", help="our file to the original's names")
    command.add_argument("source")
    command.add_argument("output")
    command.add_argument("--like", help="a file of the original whose unused entries to carry over")
    command.add_argument("--anchor-strides", type=int, nargs="+", default=(8, 16, 32, 64, 128))
    command.add_argument("--anchor-sizes", type=float, nargs="+", default=(64, 128, 256, 512, 1024))
    command.set_defaults(function=to_fiber)

    command = commands.add_parser("initialize", help="a checkpoint to start training from")
    command.add_argument("output")
    command.add_argument("--config-file", required=True, help="says which model")
    command.add_argument("--swin", help="Microsoft's or timm's Swin")
    command.add_argument("--roberta", help="Hugging Face's RoBERTa, a file or its folder")
    command.add_argument("--fiber", help="coarse-grained or fine-grained FIBER")
    command.add_argument(
        "opts", nargs="*", metavar="key=value", help="changes of the configuration"
    )
    command.set_defaults(function=initialize)

    # It reads its own arguments, see main().
    commands.add_parser("config", help="the original's yaml files to a recipe", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The program of `tools/convert_checkpoint.py` and `fiber-d2 convert`; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["config"]:
        return original_config.main(argv[1:], f"{prog or 'convert_checkpoint'} config")
    args = build_parser(prog).parse_args(argv)
    try:
        weights = args.function(args)
        write_atomically(args.output, lambda file: torch.save({"model": weights}, file))
    # A full disk is a PlainRunError.
    except (*EXPECTED_ERRORS, OSError, PlainRunError) as error:
        sys.stderr.write(f"{prog or 'convert_checkpoint'}: error: {message_of(error)}\n")
        return USAGE_EXIT_CODE
    sys.stdout.write(f"{args.output}: {len(weights)} entries\n")
    return 0
