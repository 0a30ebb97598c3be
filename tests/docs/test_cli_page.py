"""The reference of the command line says what the parsers say."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from mlx_tune.cli import SUBCOMMANDS, build_parser

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference" / "cli.md").read_text()


def test_the_page_is_made_from_the_parsers():
    made = runpy.run_path(str(DOCS / "make_cli_page.py"))["cli_page"]()
    assert made == PAGE, "run python docs/make_cli_page.py"


def examples():
    """The words after `mlx-tune` of every example, without what stands behind it."""
    for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command, *_ = re.split(r" {2,}|&&|>", line.partition("mlx-tune ")[2])
            yield shlex.split(command)


@pytest.mark.parametrize("words", list(examples()), ids=" ".join)
def test_the_examples_are_ones_that_the_parsers_take(words):
    parsed, unknown = build_parser().parse_known_args(words)
    assert parsed.command == words[0]
    assert unknown == []


def test_every_command_has_examples():
    assert {words[0] for words in examples()} == set(SUBCOMMANDS)
