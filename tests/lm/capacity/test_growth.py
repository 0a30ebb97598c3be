from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from mlx_tune.lm.capacity.growth import Largest, foretell, largest_foretold
from mlx_tune.measuring.floors import Floor

polynomials = st.lists(st.tuples(*[st.integers(0, 1000)] * 3).filter(lambda p: p[1] + p[2] > 0), min_size=1, max_size=4)


@given(polynomials, st.integers(1, 200_000))
def test_the_answer_is_that_of_trying_every_size(kinds, budget):
    def floor(n: int) -> Floor:
        live = [a + b * n + c * n * n for a, b, c in kinds]
        return Floor(max(live), live)

    found = largest_foretold(floor, budget, (1, 2, 4), most=400)
    expected = max((n for n in range(1, 401) if floor(n).bytes <= budget), default=0)
    assert found.size == expected
    assert found.bytes == floor(expected or 1).bytes
    assert found.limited == (expected == 400)


def test_sizes_are_multiples_of_the_step_and_at_most_the_most():
    assert largest_foretold(lambda n: Floor(n), 1000, (64, 128), step=32) == Largest(992, 992)
    assert largest_foretold(lambda n: Floor(n), 1000, (64, 128), step=32, most=100) == Largest(96, 96, limited=True)


def test_what_does_not_grow_is_limited_by_the_most_alone():
    assert largest_foretold(lambda n: Floor(7), 10, (1, 4), most=50) == Largest(50, 7, limited=True)


def test_an_answer_far_beyond_what_was_read_is_read_too():
    looked = []

    def floor(n: int) -> Floor:
        looked.append(n)
        return Floor(10 * n if n < 50 else 20 * n)

    assert largest_foretold(floor, 1000, (1, 4)).size == 50
    assert max(looked) >= 50


def test_other_operations_at_some_sizes_are_joined_by_their_peaks():
    seen = {1: Floor(10, [10, 5]), 3: Floor(30, [30, 6, 7])}
    assert foretell(seen, 1, 2) == 20
