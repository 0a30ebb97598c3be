"""`mlx-tune bench`: the claims of the measurement pages on this machine, as a table and a file to send."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mlx_tune.cli.arguments import add_json, make_parser
from mlx_tune.cli.output import check_place, print_result, write_whole

_EXAMPLES = """\
  mlx-tune bench                           every claim: ten minutes on a Mac
  mlx-tune bench --quick                   the same at small sizes, a minute
  mlx-tune bench --only floors autobatch   some of them
  mlx-tune bench --out m3-max.json         into another file, or a begun one

exit codes: 0 it measured, whatever holds; 1 the process of a section died; 130 interrupted, with the sections until
then in the table and in the file"""


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add `bench` and its options."""
    parser = make_parser(
        subparsers,
        "bench",
        "measure the claims of the documentation on this machine, for a table and a file",
        description="Measure what the pages of measurements claim, on this machine: each claim beside its figure, and "
        "whether it holds. Each section runs in a process of its own, which takes at most half of the memory that is "
        "free, and 0.5 GB on a processor or 1 GB on a GPU with --quick, 2 or 4 GB without; one that is predicted to "
        "need more is left out. The weights that are wired are at most half of what this machine may wire, half of "
        "what is free, what other processes leave, and 32 GB (0.5 GB with --quick). The file "
        "holds the machine, versions and figures, and no names or paths of yours.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: behaviour and memory, not speed")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the sections to measure; `--list` shows their names")
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="mlx-tune-bench.json",
        help="the file, written after each section; sections that it holds of this machine and these versions are kept "
        "until they are measured anew (default: mlx-tune-bench.json)",
    )
    parser.add_argument("--list", action="store_true", help="list the sections and their claims, and measure nothing")
    add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Measure, write and print. Returns 1 where a section's process died, 130 after a Ctrl-C, else 0."""
    from mlx_tune.bench.reading import read_report
    from mlx_tune.bench.report import BenchReport
    from mlx_tune.bench.run import begin, measure
    from mlx_tune.bench.sections import choose
    from mlx_tune.progress import progress_bar

    sections = choose(arguments.only)
    if arguments.list:
        print(_list(arguments.json))
        return 0
    check_place("--out", arguments.out)
    file = Path(arguments.out)
    earlier = read_report(file.read_text(encoding="utf-8"), f"--out {str(file)!r}") if file.exists() else None
    report = begin(earlier)

    def write(so_far: BenchReport) -> None:
        write_whole(file, json.dumps(so_far.to_dict(), indent=1, allow_nan=False) + "\n")

    size = "quick" if arguments.quick else "full"
    with progress_bar("measuring", total=len(sections)) as bar:

        def written(so_far: BenchReport) -> None:
            write(so_far)
            if not so_far.interrupted:
                bar.advance()

        report = measure(
            sections, size, report, starting=lambda section: bar.update(text=section.name), measured=written
        )
    print_result(report, as_json=arguments.json)
    print(where_to_send(arguments.out), file=sys.stderr)
    if report.interrupted:
        return 130
    return 1 if report.broke else 0


def where_to_send(file: str) -> str:
    """The sentence that says what to do with the file."""
    return (
        f"The figures are in {file}, with no user names and no paths. Send it to the project, so that the page of "
        "machines gets a row for this one: attach it to an issue of the kind 'A machine', or add it to "
        "docs/measurements/machines/ in a pull request."
    )


def _list(as_json: bool) -> str:
    """Every section and its claims."""
    from mlx_tune.bench.sections import SECTIONS
    from mlx_tune.cli.output import folded
    from mlx_tune.presentation.tabular import Table

    claims = [(section.name, claim) for section in SECTIONS for claim in section.claims]
    if as_json:
        listed = [
            {"section": name, "claim": claim.name, "text": claim.text, "page": claim.page} for name, claim in claims
        ]
        return json.dumps(listed, indent=2)
    return folded(Table(["section", "claim", "page"], [[name, claim.text, claim.page] for name, claim in claims]))
