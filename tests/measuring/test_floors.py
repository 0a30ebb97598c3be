"""Two readings of the graph against the floor of every size between and beyond them."""

from itertools import pairwise

import pytest
import small_steps
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune.measuring.floors import Floor, pieces
from mlx_tune.measuring.step_floor import StepFloor


def straight(knots, size):
    """Straight lines between knots."""
    for (a, low), (b, high) in pairwise(sorted(knots.items())):
        if a <= size <= b:
            return low + (size - a) / (b - a) * (high - low)
    raise AssertionError(f"no knots around {size}")


@given(
    operations=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**4)), min_size=1, max_size=12),
    a=st.integers(1, 20),
    distance=st.integers(1, 100),
)
def test_the_bends_give_the_highest_operation_at_every_size(operations, a, distance):
    """Operation i has start_i + rise_i * n bytes alive."""
    b = a + distance

    def alive(size):
        live = [start + rise * size for start, rise in operations]
        return Floor(max(live), live)

    found = pieces((a, alive(a)), (b, alive(b)), 4000)
    if not any(rise for _, rise in operations):
        assert found is None
    if found is None:
        return
    knots = found | {a: alive(a).bytes}
    for size in {*range(a, 200), 1000, 3999, 4000}:
        if a <= size <= max(knots):
            assert straight(knots, size) == pytest.approx(alive(size).bytes, abs=1 + 1e-9 * alive(size).bytes)


def test_nothing_is_said_where_other_operations_ran():
    assert pieces((1, Floor(3, (1, 2, 3))), (8, Floor(5, (4, 5))), 100) is None
    assert pieces((1, Floor(3)), (8, Floor(5)), 100) is None


@pytest.mark.cpu_only
@pytest.mark.parametrize("compiled", [False, True])
def test_two_looks_at_a_graph_foresee_all_others(compiled):
    floor = StepFloor(*small_steps.build(compiled=compiled))
    small, large = floor(4), floor(12)
    knots = pieces((4, small), (12, large), 10**6) | {4: small.bytes, 12: large.bytes}
    for size in (5, 7, 40, 333):
        assert straight(knots, size) == pytest.approx(floor(size).bytes, rel=1e-3)
