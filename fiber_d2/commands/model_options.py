"""Options of the commands that ask a model."""

from __future__ import annotations

import argparse
import os

from fiber_d2.layers.precision import LOW_PRECISION

# What answers where no model is named.
CONFIG, WEIGHTS = "quickstart", os.path.join("output", "quickstart", "model_final.pth")


def add_model_options(
    parser: argparse.ArgumentParser, *, default_config: str | None = CONFIG
) -> None:
    """--config, which has to be given where it has no default, --weights and --opts."""
    add = parser.add_argument
    default = "" if default_config is None else " (default: %(default)s)"
    add("--config", "--config-file", default=default_config, required=default_config is None,
        help="configuration: a file, or the name of one that comes with fiber_d2"
        f"{default}")  # fmt: skip
    add("--weights", help="checkpoint, ours or the original FIBER's")
    add("--opts", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the configuration")


def weights_of(args: argparse.Namespace) -> str | None:
    """--weights, or those of the quickstart where its configuration answers.

    Raises:
        FileNotFoundError: the quickstart was not trained here.
    """
    if args.weights is not None or args.config != CONFIG:
        return args.weights
    if not os.path.isfile(WEIGHTS):
        raise FileNotFoundError(
            f"There is no {WEIGHTS} here: train the quickstart first (`make quickstart`, some "
            "minutes), or name a configuration by --config and a checkpoint by --weights."
        )
    return WEIGHTS


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """--device and --precision."""
    add = parser.add_argument
    add("--device", help="such as cpu, cuda:1 (default: a GPU where there is one)")
    add("--precision", choices=["float32", *LOW_PRECISION], help="number format (default: as the "
        "configuration says, which is float32 where it says nothing)")  # fmt: skip
