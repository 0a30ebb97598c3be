"""Points that no other one beats, against a comparison of all with all."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.pareto import unbeaten


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(-20, 20).map(float)), max_size=12))
@settings(deadline=None, max_examples=200)
def test_unbeaten_points_are_those_that_none_beats(points: list[tuple[int, float]]) -> None:
    found = unbeaten(points)
    expected = {p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)}
    assert {points[i] for i in found} == expected
    assert len(found) == len(expected)
    assert [points[i] for i in found] == sorted(expected)
