"""Write `reference/cli.md` from the command line's own parsers: `python docs/make_cli_reference.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_tune.cli import SUBCOMMANDS, build_parser

PAGE = Path(__file__).parent / "reference" / "cli.md"

_HEAD = """\
# Command line

<!-- Written by docs/make_cli_reference.py from the parsers; do not edit. -->

`mlx-tune COMMAND`, or `python -m mlx_tune COMMAND`. Flags are mlx-lm's where mlx-lm has them. Results go to standard
output, progress and errors to standard error; with `--json` the result is one JSON document. Files and folders that a
command writes appear whole or not at all, also where Ctrl-C ends it.

| exit code | meaning |
| ---: | --- |
| 0 | it worked |
| 1 | it worked, and the answer is bad news: a failed check, a batch that does not fit |
| 2 | it could not be done as asked; one line on standard error says why |
| 130 | interrupted |
"""


def page() -> str:
    """The whole page."""
    choices = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    return "\n".join([_HEAD, *(section(name, choices[name]) for name in SUBCOMMANDS)])


def section(name: str, parser: argparse.ArgumentParser) -> str:
    """One subcommand: what it does, its options by group, its examples."""
    lines = [f"## mlx-tune {name}", "", _plain(parser.description or ""), ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if not actions:
            continue
        if group.title not in ("options", "positional arguments"):
            lines += [f"**{group.title}**", ""]
        lines += ["| option | meaning |", "| --- | --- |"]
        lines += [
            f"| {_flags(action)} | {_plain(action.help or '').replace('|', chr(92) + '|')} |" for action in actions
        ]
        lines.append("")
    if name == "lora":
        lines += ["Every option of `mlx_lm.lora` besides; `mlx-tune lora --help` lists them.", ""]
    if parser.epilog:
        lines += ["```text", parser.epilog.rstrip(), "```", ""]
    return "\n".join(lines)


def _flags(action: argparse.Action) -> str:
    value = ""
    if action.choices:
        value = " " + "|".join(str(choice) for choice in action.choices)
    elif action.nargs != 0:
        value = f" {action.metavar or action.dest.upper()}"
    if action.nargs == "?":
        value = f" [{value.strip()}]"
    return ", ".join(f"`{flag}{value}`" for flag in action.option_strings).replace("|", "\\|")


def _plain(text: str) -> str:
    return " ".join(text.replace("%%", "%").split())


if __name__ == "__main__":
    PAGE.write_text(page())
