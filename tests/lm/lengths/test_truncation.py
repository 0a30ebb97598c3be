"""Rows that are cut: counted by the row and the token, and said by whoever trains."""

import mlx.optimizers as optim
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune import lm
from mlx_tune.errors import InvalidArgumentError


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 25))
def test_what_is_left_and_what_is_cut_are_all_there_is(lengths, most):
    found = lm.truncation([([1] * n, 0) for n in lengths], most)
    kept = sum(min(n, most) for n in lengths)
    assert found.tokens == sum(lengths) == kept + found.cut_tokens
    assert found.cut_rows == sum(n > most for n in lengths)
    assert (found.rows, found.longest, found.max_length) == (len(lengths), max(lengths), most)
    assert ("no row cut" in str(found)) is (found.cut_rows == 0)


def test_the_sentence():
    rows = [([1] * n, 0) for n in (1200, 30, 2000)]
    assert str(lm.truncation(rows, 1000)) == (
        "2 of 3 rows cut at 1,000 tokens: 1,200 of 3,230 tokens (37.2 %) are left out; the longest row has 2,000"
    )
    assert str(lm.truncation(rows, 2000)) == "no row cut: the longest has 2,000 tokens"


@pytest.mark.parametrize("rows", [[[1, 2, 3], [1, 2]], [([1, 2, 3], 1), ([1, 2], 0)]])
def test_rows_in_either_form(rows):
    assert lm.truncation(rows, 2).cut_tokens == 1


def test_bad_input_is_refused():
    with pytest.raises(InvalidArgumentError, match="no rows"):
        lm.truncation([], 4)
    with pytest.raises(InvalidArgumentError, match="max_length"):
        lm.truncation([([1], 0)], 0)


@pytest.mark.usefixtures("adapters_exist")
def test_a_run_says_how_much_it_cut(toy, rows, arguments):
    whole = lm.train(toy(lora=True), optim.SGD(1e-2), rows, None, arguments(max_seq_length=128))
    assert whole.truncation.startswith("no row cut")
    cut = lm.train(toy(lora=True), optim.SGD(1e-2), rows, None, arguments(max_seq_length=8))
    assert cut.truncation == str(lm.truncation(rows, 8))
    assert f"training rows: {cut.truncation}" in str(cut)
    assert "cut at 8 tokens" in cut.truncation
