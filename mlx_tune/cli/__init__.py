"""The command `mlx-tune`: one file a subcommand.

Results go to standard output, as text or with `--json` as one JSON document; progress and errors go to standard
error. Exit codes: 0 it worked; 1 it worked and the answer is bad news (a failed check, a model that does not fit);
2 it could not be done as asked, with one line that says why; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mlx_tune import __version__
from mlx_tune.errors import MlxTuneError

#: The subcommands in the order in which help lists them; each is a module here with `add_parser` and `run`.
SUBCOMMANDS = ("demo", "doctor", "estimate", "autobatch", "quantize", "checkpoint", "fit", "lora")

EXIT_WORKED, EXIT_BAD_NEWS, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand in it."""
    parser = argparse.ArgumentParser(
        prog="mlx-tune",
        description="Plan memory in MLX: checkpointing, the largest batch, quantization, wiring, and what each costs.",
        epilog="mlx-tune COMMAND --help shows the options of one command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"mlx-tune {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in SUBCOMMANDS:
        importlib.import_module(f"mlx_tune.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = build_parser().parse_args(argv)
    command = importlib.import_module(f"mlx_tune.cli.{arguments.command}")
    try:
        return command.run(arguments)
    except MlxTuneError as error:
        print(f"mlx-tune {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print(f"mlx-tune {arguments.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
