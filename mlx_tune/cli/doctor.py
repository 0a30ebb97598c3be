"""`mlx-tune doctor`: find what is wrong with the installation or the machine."""

from __future__ import annotations

import argparse
import json
import sys

from mlx_tune.cli.arguments import add_json, make_parser
from mlx_tune.cli.output import folded, print_result

EXAMPLES = """\
  mlx-tune doctor                   every check, a few seconds
  mlx-tune doctor --only blas disk  some of them
  mlx-tune doctor --bench           also measure: lazy evaluation, matmul, ...
  mlx-tune doctor --bench wired     does wiring memory gain anything here?
  mlx-tune doctor --issue           a text to paste into a bug report
  mlx-tune doctor --explain "There is no Stream(gpu, 0) in current thread."

exit codes: 0 no check failed (warnings are no failures), or the error is known; 1 a check failed, or the error to
explain is not known; 2 not a check's name"""


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = make_parser(
        subparsers,
        "doctor",
        "check the installation and the machine, with a fix for what is wrong",
        description="Check the installation and the machine. Works where `import mlx.core` dies, and changes nothing.",
        examples=EXAMPLES,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the checks to make; `--list` shows their names")
    parser.add_argument(
        "--bench",
        nargs="*",
        metavar="NAME",
        help="also measure, for a minute or two; with names, measure those alone",
    )
    add_json(parser)
    parser.add_argument("--issue", action="store_true", help="print Markdown for a bug report: no user names, no paths")
    parser.add_argument("--list", action="store_true", help="list the checks and what each is for")
    parser.add_argument("--explain", metavar="TEXT", help="say what an error of MLX means; `-` reads standard input")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Make the checks and print what they found. Returns 1 where one failed, else 0."""
    from mlx_tune.diagnosis.doctor import diagnose
    from mlx_tune.diagnosis.explain import explain

    if arguments.explain is not None:
        explanation = explain(sys.stdin.read() if arguments.explain == "-" else arguments.explain)
        print_result(explanation, as_json=arguments.json)
        return 0 if explanation.known else 1
    if arguments.list:
        print(_list(arguments.json))
        return 0
    bench: bool | list[str] = arguments.bench or arguments.bench == []  # named, all of them, or none
    diagnosis = diagnose(arguments.only, bench=bench, progress=sys.stderr.isatty() or bool(bench))
    if arguments.issue:
        print(diagnosis.issue())
    else:
        print_result(diagnosis, as_json=arguments.json)
    return diagnosis.exit_code


def _list(as_json: bool) -> str:
    from mlx_tune.diagnosis.check import all_checks
    from mlx_tune.presentation.tabular import Table

    if as_json:
        listed = [
            {"name": one.name, "theme": one.theme, "bench": one.bench, "title": one.title} for one in all_checks()
        ]
        return json.dumps(listed, indent=2)
    rows = [[one.name, one.theme, one.title] for one in all_checks()]
    return folded(Table(["check", "theme", "what it looks at"], rows))
