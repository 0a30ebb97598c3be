from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mlx_tune.lm.capacity.repetition import Run, find_runs, kept_blocks


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        ("", ()),
        ("abc", ()),
        ("aa", ()),
        ("aaa", (Run(0, 1, 3),)),
        ("dddmmmmm", (Run(0, 1, 3), Run(3, 1, 5))),
        ("sssgsssgsssg", (Run(0, 4, 3),)),
        ("aaaaabbbbbb", (Run(0, 1, 5), Run(5, 1, 6))),
    ],
)
def test_runs_are_found(kinds, runs):
    assert find_runs(kinds, least=2) == runs


@given(st.text("ab", max_size=14))
def test_a_shorter_model_has_the_same_kinds_in_the_same_order(kinds):
    runs = find_runs(kinds, least=2)
    for run in runs:
        assert run.repeats > 2
        block = kinds[run.start : run.start + run.period]
        assert kinds[run.start : run.start + run.period * run.repeats] == block * run.repeats
    assert kept_blocks(len(kinds), runs, [run.repeats for run in runs]) == tuple(range(len(kinds)))
    short = kept_blocks(len(kinds), runs, [2] * len(runs))
    assert len(short) == len(kinds) - sum((run.repeats - 2) * run.period for run in runs)
    assert list(short) == sorted(set(short))
