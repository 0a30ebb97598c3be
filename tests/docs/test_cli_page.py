"""The reference of the command line says what the parsers say."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_made_from_the_parsers():
    made = runpy.run_path(str(DOCS / "make_cli_page.py"))["cli_page"]()
    assert (DOCS / "reference" / "cli.md").read_text() == made, "run python docs/make_cli_page.py"
