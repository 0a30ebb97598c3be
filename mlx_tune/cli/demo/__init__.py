"""`mlx-tune demo`: the whole path on real text, in a few minutes on two processor cores."""

from __future__ import annotations

import argparse

from mlx_tune.cli.arguments import add_json, make_parser

_EXAMPLES = """\
  mlx-tune demo                            train on Python's own source
  mlx-tune demo --text notes/ --steps 200  on your own text, longer
  mlx-tune demo --budget 1GB --out model/  with more memory, into a named folder"""


def add_parser(subparsers: object) -> argparse.ArgumentParser:
    """Add `demo` and its options."""
    parser = make_parser(
        subparsers,
        "demo",
        "train, shrink and save a small model on real text, showing what each step costs",
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--text", metavar="PATH", help="a text file or a folder of them (default: the standard library's source)"
    )
    parser.add_argument(
        "--budget", default="64MB", help="memory to train in; scarce on purpose, so that it matters (default: 64MB)"
    )
    parser.add_argument("--steps", type=int, default=24, help="training steps (default: 24)")
    parser.add_argument(
        "--out", metavar="DIR", default="mlx-tune-demo", help="a new folder for the models (default: mlx-tune-demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration."""
    from mlx_tune.cli.demo.steps import run_demo

    return run_demo(arguments)
