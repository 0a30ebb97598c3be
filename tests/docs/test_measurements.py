"""A page of measurements says what was measured with which command on which machine, and what was not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "measurements"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.stem != "index")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_how_where_and_what_not(page):
    text = page.read_text()
    command = r"mlx-tune bench" if page.stem == "machines" else r".*python tests/benchmarks/\w+\.py"
    assert re.search(rf"^\$ {command}", text, re.MULTILINE), "the command"
    assert re.search(r"mlx 0\.\d+\.\d+", text), "the versions"
    assert re.search(r"EPYC|H100|H200|Apple M\d", text), "the machine"
    assert re.search(r"\b20\d\d\b", text), "the day"
    assert re.search(r"Apple|Metal|on a Mac", text), (
        "whether it was measured on an Apple GPU, where a reader would think so"
    )


def test_the_index_lists_every_page():
    listed = re.findall(r"\]\(([\w-]+)\.md\)", (FOLDER / "index.md").read_text())
    assert sorted(set(listed)) == [page.stem for page in PAGES]
