"""Text tables."""

from __future__ import annotations

import pytest

from mlx_tune.tables import render_table


def test_numbers_go_right_words_left_and_nothing_trails():
    text = render_table(
        ["layer", "bytes", "note"], [["a", 1, None], ["longer", 1000, "x"]], title="Title", notes=["one", "two"]
    )
    assert text.splitlines() == [
        "Title",
        "layer   bytes  note",
        "------  -----  ----",
        "a           1",
        "longer   1000  x",
        "one",
        "two",
    ]


def test_an_empty_table_is_its_headings():
    assert render_table(["a", "b"], []) == "a  b\n-  -"


def test_a_row_of_another_width_is_a_mistake():
    with pytest.raises(ValueError, match="2 cells under 1 headings"):
        render_table(["a"], [[1, 2]])
