"""Write a model for other programs: ONNX or torch.export files, with what to know of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fiber_d2.commands.model_options import add_model_options
from fiber_d2.engine.errors import exit_status_of
from fiber_d2.export.deform_conv import FORMS
from fiber_d2.export.description import read_description
from fiber_d2.export.onnx_files import OPSET
from fiber_d2.export.write import FORMATS, export

EPILOG = """examples:
  fiber-d2 export --config C --weights W.pth --output output/onnx
  fiber-d2 export --config C --weights W.pth --output output/int8 --int8
  fiber-d2 export --config C --weights W.pth --output output/parts --parts
  fiber-d2 export --config C --weights W.pth --output output/torch --format torch
export.json in the folder says what goes in and comes out. In Python,
fiber_d2.export.ExportedPredictor asks such a folder as a Predictor is asked.
Exit status: 0 fine, 2 for a mistake in the command.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_model_options(parser, default_config=None)
    add("--output", required=True, metavar="DIR", help="folder to write")
    add("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s")
    add("--parts", action="store_true", help="text prefix, image prefix and the rest, instead of "
        "the whole")  # fmt: skip
    add("--deform-conv", choices=FORMS, default=FORMS[0], help="how deformable convolution is "
        "written (default: %(default)s)")  # fmt: skip
    add("--int8", action="store_true", help="of ONNX: weights of linear layers in 8 bits")
    add("--opset", type=int, default=OPSET, metavar="N", help="of ONNX (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    folder = export(
        args.config,
        args.weights,
        args.output,
        format=args.format,
        parts=args.parts,
        deform_conv=args.deform_conv,
        int8=args.int8,
        opset=args.opset,
        overrides=args.opts,
    )
    # Other files may be there from before.
    for graph in read_description(folder)["graphs"].values():
        for path in sorted(folder.glob(f"{graph['file']}*")):
            sys.stdout.write(f"{path}: {path.stat().st_size / 1e6:.1f} MB\n")
    return 0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The program; its exit status."""
    args = build_parser(prog).parse_args(argv)
    return exit_status_of(lambda: run(args), f"{prog or 'export'}: ")
