"""The command `mlx-tune`: one file a subcommand.

Results go to standard output, as text or with `--json` as one JSON document; progress and errors go to standard
error. Exit codes: 0 it worked; 1 it worked and the answer is bad news (a failed check, a model that does not fit);
2 it could not be done as asked, with one line that says why; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from mlx_tune.cli.arguments import Subcommand
from mlx_tune.errors import MlxTuneError
from mlx_tune.version import __version__

#: The subcommands in the order in which help lists them; each is a module here with `add_parser` and `run`.
SUBCOMMANDS = ("demo", "doctor", "bench", "fits", "estimate", "autobatch", "quantize", "checkpoint", "fit", "lora")

EXIT_WORKED, EXIT_BAD_NEWS, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand in it."""
    parser = argparse.ArgumentParser(
        prog="mlx-tune",
        description="Plan memory in MLX: checkpointing, the largest batch, quantization, wiring, and what each costs.",
        epilog="mlx-tune COMMAND --help shows the options of one command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"mlx-tune {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Subcommand)
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
        code: int = command.run(arguments)
        sys.stdout.flush()  # a reader that has gone is met here, and not when the process ends
        return code
    except MlxTuneError as error:
        return _refuse(arguments.command, str(error))
    except BrokenPipeError:  # as in `mlx-tune fit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_REFUSED
    except OSError as error:
        place = "" if error.filename is None else f": {error.filename!r}"
        return _refuse(arguments.command, f"{error.strerror or error}{place}")
    except (RuntimeError, MemoryError) as error:
        from mlx_tune.measuring.step_outcome import first_line, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _refuse(
            arguments.command,
            f"out of memory ({first_line(error)}). Take a smaller batch, shorter rows or --grad-checkpoint; "
            "`mlx-tune autobatch` and `mlx-tune fit` find what fits.",
        )
    except KeyboardInterrupt:
        print(f"mlx-tune {arguments.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _refuse(command: str, text: str) -> int:
    """Say on one line why it could not be done."""
    print(f"mlx-tune {command}: {' '.join(text.split())}", file=sys.stderr)
    return EXIT_REFUSED
