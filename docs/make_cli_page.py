"""Write the reference of the command line from its parsers: python docs/make_cli_page.py

`tests/docs/test_cli_page.py` holds that the page in the repository is what this writes.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from mlx_tune.cli import build_parser

PAGE = Path(__file__).resolve().parent / "reference" / "cli.md"

_INTRODUCTION = """\
<!-- Made by `python docs/make_cli_page.py`: change the parsers in mlx_tune/cli, not this page. -->

# Command line

`mlx-tune COMMAND`, or `python -m mlx_tune COMMAND`. Results go to standard output, as text or with `--json` as one JSON
document; progress and errors go to standard error. `mlx-tune COMMAND --help` shows the same options with examples.

| exit code | meaning |
| --- | --- |
| 0 | it worked |
| 1 | it worked, and the answer is bad news: a failed check, a model that does not fit |
| 2 | it could not be done as asked; one line says why |
| 3 | it worked, and tells nothing: no gradient was put to the test (`checkpoint --verify`) |
| 130 | interrupted |
"""


def cli_page() -> str:
    """The page, in Markdown."""
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = [_INTRODUCTION]
    for name, parser in subparsers.choices.items():
        parts.append(f"## mlx-tune {name}\n\n{_sentence(parser.description or '')}\n")
        rows = [_row(parser, action) for action in parser._actions if action.help != argparse.SUPPRESS]
        parts.append("| option | meaning |\n| --- | --- |\n" + "".join(row for row in rows if row))
        examples = (parser.epilog or "").partition("examples:\n")[2].partition("\n\n")[0]
        if examples:
            parts.append(f"```text\n{textwrap.dedent(examples).rstrip()}\n```\n")
    return "\n".join(parts)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    if isinstance(action, argparse._HelpAction):
        return ""
    value = "" if action.nargs == 0 else " " + parser._get_formatter()._format_args(action, _metavar(action))
    names = ", ".join(action.option_strings) + value if action.option_strings else _metavar(action)
    meaning = _text((action.help or "") % dict(vars(action), prog=parser.prog))
    return f"| `{_text(names)}` | {meaning}{' (required)' if action.required else ''} |\n"


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def _sentence(text: str) -> str:
    text = _text(text)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(cli_page())
