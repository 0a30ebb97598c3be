"""Text tables."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies

from mlx_tune.presentation.tables import fit_to, fold, render_table


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


words = strategies.text("abcdefgh.-", min_size=1, max_size=9)
texts = strategies.lists(words, max_size=6).map(" ".join)
units = strategies.sampled_from(["MB", "ms", "% ± 2 %"])
numbers = strategies.builds("{} {}".format, strategies.integers(0, 9999), units)


def words_of(text: str) -> list[str]:
    """All words but rules, and the heading of a column that may have moved below its rows."""
    return sorted(word for word in text.split() if set(word) != {"-"} and word != "remark")


@given(strategies.lists(strategies.tuples(texts, numbers, numbers, texts), max_size=5), strategies.integers(40, 100))
def test_a_folded_table_is_narrow_enough_and_loses_no_word(rows, width: int) -> None:
    names = ["layer", "peak of the step", "time", "remark"]
    with fit_to(width):
        text = render_table(names, rows, title="A title of some words", notes=["a note " * 20])
    plain = render_table(names, rows, title="A title of some words", notes=["a note " * 20])
    assert all(len(line) <= width for line in text.splitlines())
    assert words_of(text) == words_of(plain)


@given(strategies.lists(strategies.tuples(texts, numbers), max_size=5))
def test_a_table_that_fits_is_not_touched(rows) -> None:
    plain = render_table(["layer", "peak"], rows, notes=["short"])
    with fit_to(100):
        assert render_table(["layer", "peak"], rows, notes=["short"]) == plain


def test_the_last_column_moves_below_where_wrapping_is_not_enough() -> None:
    row = ["model.layers.0.self_attn", "1.44 MB", "chosen, the largest that fits"]
    with fit_to(36):
        text = render_table(["layer", "peak", "remark"], [row])
    assert text == (
        "layer                        peak\n"
        "------------------------  -------\n"
        "model.layers.0.self_attn  1.44 MB\n"
        "    chosen, the largest that fits"
    )


def test_a_word_that_is_too_long_is_left_whole() -> None:
    with fit_to(10):
        text = render_table(["path", "n"], [["models/a-long-path", 1]])
    assert "models/a-long-path" in text


@pytest.mark.parametrize("width", [20, 33, 80])
def test_prose_is_wrapped_under_its_own_indent(width: int) -> None:
    text = fold("short\n\n    " + "many words " * 20, width)
    lines = text.splitlines()
    assert lines[:2] == ["short", ""]
    assert all(line.startswith(("    many", "    words")) for line in lines[2:])
    assert all(len(line) <= width for line in lines)
