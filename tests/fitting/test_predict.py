"""The pure part of autofit: paces and largest sizes."""

from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.fitting.predict import Pace, pace_through, thinned
from mlx_tune.measuring.forecast import largest_fitting


@given(st.floats(0, 10), st.floats(0.001, 10), st.lists(st.integers(1, 500), min_size=2, max_size=5, unique=True))
@settings(deadline=None, max_examples=100)
def test_a_pace_is_found_again_from_its_steps(fixed, row, sizes):
    found = pace_through([(n, Pace(fixed, row).seconds(n)) for n in sizes])
    assert found.seconds(100) == pytest.approx(Pace(fixed, row).seconds(100), rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0.01, 10)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=200)
def test_no_part_of_a_pace_is_negative(points):
    found = pace_through(points)
    assert found.fixed_seconds >= 0
    assert found.row_seconds >= 0
    assert found.seconds(1) > 0


def test_one_step_gives_time_in_proportion():
    assert pace_through([(4, 2.0)]) == Pace(0.0, 0.5)


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=60, unique=True).map(sorted),
    st.integers(0, 10_000),
    st.integers(0, 50),
    st.integers(0, 3),
    st.integers(0, 200_000),
)
@settings(deadline=None, max_examples=400)
def test_the_largest_size_is_the_exhaustive_answer(sizes, base, slope, bend, limit):
    def floor(n):
        return base + slope * n + bend * n * n // 100 + 997 * (n // 700)

    fitting = [n for n in sizes if floor(n) <= limit]
    assert largest_fitting(sizes, floor, limit) == (fitting[-1] if fitting else None)


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(1, 10**9))
@settings(deadline=None, max_examples=200)
def test_a_line_takes_few_questions_and_none_far_beyond_the_limit(base, slope, room):
    limit, asked = base + slope + room, set()

    def floor(n):
        asked.add(n)
        return base + slope * n

    found = largest_fitting(range(1, 1 << 32), floor, limit)
    assert found == min((1 << 32) - 1, (limit - base) // slope)
    assert len(asked) <= 24
    assert max(asked) <= 8 * found + 8


@given(
    st.lists(st.integers(1, 1000), min_size=1, unique=True).map(sorted), st.integers(1, 1000), st.integers(1, 1000),
    st.integers(1, 6),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_thinned_sizes_are_sizes_in_the_range_with_its_largest(sizes, low, high, most):
    found = thinned(sizes, low, high, most)
    inside = [n for n in sizes if low <= n <= high]
    assert set(found) <= set(inside)
    assert len(found) <= most + 1
    assert bool(found) == bool(inside)
    if inside:
        assert found[-1] == sizes[bisect_right(sizes, high) - 1]
