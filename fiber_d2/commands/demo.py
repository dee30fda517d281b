"""Show the model in a browser: a picture, a text, and the boxes that belong to its words."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence

from PIL import Image

from fiber_d2.commands.model_options import (
    WEIGHTS,
    add_device_options,
    add_model_options,
    weights_of,
)
from fiber_d2.demo.app import DemoApp
from fiber_d2.demo.examples import folder_examples, generated_examples
from fiber_d2.demo.limits import Limits
from fiber_d2.engine.errors import exit_status_of
from fiber_d2.predictions import Prediction
from fiber_d2.predictor import Predictor
from fiber_d2.queries import Expression, Query

PORT = 7860
# Seconds without a byte after which a connection is closed.
SILENCE = 30
# Boxes below it are not even sent to the page.
LOWEST_SCORE = 0.05

EPILOG = f"""examples:
  fiber-d2 demo
  fiber-d2 demo --config C --weights W.pth --examples photos/ --port 8000
Without --config and --weights the model of the quickstart answers ({WEIGHTS}).
Needs waitress, as the extra `demo` installs it. Ctrl-C ends it.
Exit status: 0 when it was ended, 2 for a mistake in the command.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    limits = Limits()
    add_model_options(parser)
    add_device_options(parser)
    add("--threshold", type=float, default=0.4, help="where the slider stands at first "
        "(default: %(default)s)")  # fmt: skip
    add("--examples", metavar="DIR", help="folder of pictures to begin with (default: generated "
        "ones, as the quickstart learns from)")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, which "
        "only this machine reaches)")  # fmt: skip
    add("--port", type=int, default=PORT, help="0 takes a free one (default: %(default)s)")
    add("--allow-host", nargs="+", default=[], metavar="NAME", help="names under which the demo "
        "may be reached, such as that of a proxy; addresses and localhost always may")  # fmt: skip
    add("--max-upload", type=float, default=limits.upload_bytes / 2**20, metavar="MB",
        help="largest file (default: %(default)g)")  # fmt: skip
    add("--max-pixels", type=float, default=limits.pixels / 1e6, metavar="MILLIONS",
        help="of a picture (default: %(default)g)")  # fmt: skip
    add("--waiting", type=int, default=limits.waiting, metavar="N", help="requests that may wait "
        "while one is answered; others are told to come again (default: %(default)s)")  # fmt: skip
    add("--timeout", type=float, default=limits.timeout, metavar="SECONDS", help="of a request, "
        "waiting included (default: %(default)g)")  # fmt: skip
    return parser


def listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        ValueError: no such address here, or the port is taken.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} is no port: it lies between 0 and 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        # create_server adds the address to the text, which is said here already.
        known = isinstance(error, socket.gaierror) or error.errno is None
        reason = error.strerror if known else os.strerror(error.errno)
        raise ValueError(
            f"Cannot listen at {host}, port {port} ({reason}): choose others by --host and --port."
        ) from error


def warn_if_open(host: str) -> None:
    """Say who can reach what was told to listen beyond this machine."""
    if not ipaddress.ip_address(host).is_loopback:
        sys.stderr.write(
            f"warning: listening at {host}, so everyone who reaches this machine over the network "
            "can use the demo. It has no passwords and no encryption.\n"
        )


def run(args: argparse.Namespace) -> int:
    try:
        import waitress
    except ImportError as error:
        raise ValueError(
            "The demo needs waitress, which is not installed: pip install waitress."
        ) from error
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold is {args.threshold}, but lies between 0 and 1.")
    limits = Limits(
        upload_bytes=int(args.max_upload * 2**20),
        pixels=int(args.max_pixels * 1e6),
        waiting=args.waiting,
        timeout=args.timeout,
    )
    weights = weights_of(args)
    # Before the model is loaded: a port that is taken is told at once.
    with listen(args.host, args.port) as listener:
        if args.examples:
            examples = folder_examples(args.examples, max_pixels=limits.pixels)
        else:
            examples = generated_examples()
        predictor = Predictor(
            args.config,
            weights,
            device=args.device,
            precision=args.precision,
            overrides=args.opts,
        )

        def ask(image: Image.Image, query: Query) -> Prediction:
            # An expression means one object, whose box is shown whatever its score.
            lowest = 0.0 if isinstance(query, Expression) else LOWEST_SCORE
            return predictor(image, query, threshold=lowest)

        names = [os.path.basename(name) for name in (args.config, weights) if name]
        app = DemoApp(
            ask,
            model=", ".join([*names, f"on {predictor.device}"]),
            examples=examples,
            limits=limits,
            threshold=args.threshold,
            hosts=[args.host, *args.allow_host],
        )
        server = waitress.create_server(
            app,
            sockets=[listener],
            # Those who wait, one that is answered, and some for pages and for saying "busy".
            threads=limits.waiting + 5,
            # Only what is far too large is cut off; the rest is told so.
            max_request_body_size=4 * limits.upload_bytes + 2**20,
            channel_timeout=SILENCE,
            # Notices visitors who left while they waited.
            channel_request_lookahead=1,
            ident=None,
        )
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        warn_if_open(address)
        sys.stdout.write(f"The demo is at http://{shown}:{port} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        server.run()
        app.close()
    return 0


def prepare_process() -> None:
    """What the program wants of a process of its own."""
    # Waitress says every request that had to wait; the page says so as well.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The program; its exit status."""
    args = build_parser(prog).parse_args(argv)
    return exit_status_of(lambda: run(args), f"{prog or 'demo'}: ", interrupted=0)
