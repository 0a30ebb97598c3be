"""Arguments that several subcommands share, in mlx-lm's words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mlx_tune.presentation.tables import fold


class Subcommand(argparse.ArgumentParser):
    """A subcommand's parser: what it does not know, it refuses with its own usage."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse all of it, or end with an error."""
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return known, rest


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps sentences, and leaves examples as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(line if line.startswith(" ") else fold(line, width) for line in text.splitlines())


def make_parser(
    subparsers: Any, name: str, help_text: str, *, description: str | None = None, examples: str = ""
) -> argparse.ArgumentParser:
    """A subcommand's parser, with its examples below the options as they are written.

    Args:
        subparsers: The result of `add_subparsers`.
        name: The subcommand.
        help_text: One line for the list of commands.
        description: The first sentence of `--help`; the same line by default.
        examples: Commands to copy.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help_text,
        description=description or help_text,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=_Formatter,
    )
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`, and whether Python files that come with it may be run."""
    parser.add_argument("--model", required=True, help="a model's folder, or its name on the hub")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=None,
        help="run Python files that come with the model, as mlx_lm does",
    )
