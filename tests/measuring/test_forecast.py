"""What the graph is asked, and how little of it."""

import mlx.core as mx
import pytest
import small_steps

from mlx_tune import memory_limit, track_memory
from mlx_tune.measuring.floors import Floor
from mlx_tune.measuring.forecast import Forecast, read_ahead
from mlx_tune.measuring.step_floor import StepFloor

ENDLESS = range(1, 1 << 32)


class Asked:
    """An estimate that notes what it was asked."""

    def __init__(self, curve):
        self.curve, self.sizes = curve, []

    def __call__(self, size):
        self.sizes.append(size)
        return Floor(self.curve(size))


def line(n):
    return 1000 + 10 * n


def bent(n):
    """All but flat up to 500, where the optimizer's update needs more than the batch does."""
    return max(5500 + n, 1000 + 10 * n)


def test_a_straight_floor_is_known_everywhere_after_a_few_looks():
    asked = Asked(line)
    forecast = Forecast(asked, ENDLESS, 50_000)
    assert len(asked.sizes) <= 6
    assert [forecast(n) for n in (1, 77, 4900, 10**6)] == [line(n) for n in (1, 77, 4900, 10**6)]
    assert not forecast.look(3000)
    assert 3000 not in asked.sizes


@pytest.mark.parametrize("curve", [line, bent])
@pytest.mark.parametrize("budget", [6500, 9000, 10**6])
def test_no_look_goes_far_beyond_the_budget(curve, budget):
    """A line through the flat part of a bent floor crosses the budget thousands of times beyond the answer."""
    asked = Asked(curve)
    Forecast(asked, ENDLESS, budget)
    assert max(curve(n) for n in asked.sizes) <= 8 * budget


@pytest.mark.parametrize("budget", [6500, 9000, 10**6])
def test_the_crossing_of_a_bent_floor_is_found(budget):
    forecast = Forecast(Asked(bent), ENDLESS, budget)
    answer = (budget - 1000) // 10
    assert bent(answer) <= budget < bent(answer + 1)
    assert forecast(answer) == pytest.approx(budget, rel=0.05)
    forecast.look(answer)  # bent, so one more look is taken where there was none
    assert forecast(answer) == bent(answer)


def test_a_floor_that_stops_rising_is_followed_no_further():
    """make_batch has no more rows to give."""
    asked = Asked(lambda n: line(min(n, 20)))
    Forecast(asked, ENDLESS, 10**9)
    assert max(asked.sizes) <= 8**4


def test_only_given_sizes_are_asked_for():
    sizes = (2, 3, 5, 6, 10, 15, 30)
    asked = Asked(line)
    Forecast(asked, sizes, 1160)
    assert set(asked.sizes) <= set(sizes)
    assert 30 not in asked.sizes


def test_a_smallest_size_above_the_budget_ends_it_before_a_step_is_taken():
    asked, warmed = Asked(line), []
    forecast = read_ahead(asked, lambda *of: warmed.append(of), ENDLESS, 1000)
    assert asked.sizes == [8, 1]
    assert warmed == []
    assert forecast(1) == 1010


@pytest.mark.parametrize("budget", [1050, 1500, 50_000])
def test_the_first_step_is_taken_at_the_smallest_size_and_told_what_it_needs_at_most(budget):
    warmed = []
    read_ahead(Asked(line), lambda *of: warmed.append(of), ENDLESS, budget)
    ((size, told),) = warmed
    assert size == 1
    assert line(1) <= told <= budget


@pytest.mark.parametrize(("stale", "asked_twice"), [(True, True), (False, False)])
def test_the_first_step_makes_the_first_look_stale_only_where_it_made_state_of_which_that_knew_nothing(
    stale, asked_twice
):
    asked = Asked(line)
    read_ahead(asked, lambda size, floor: stale, ENDLESS, 50_000)
    assert (asked.sizes.count(8) == 2) is asked_twice


@pytest.mark.cpu_only
def test_what_else_the_process_holds_counts():
    step, make_batch, state = small_steps.build()
    beside = mx.ones(5_000_000 // 4)
    mx.eval(beside, step(make_batch(1)), state[0].state, state[1].state)
    predicted = StepFloor(step, make_batch, state)(3).bytes
    batch = make_batch(3)
    mx.eval(batch)
    peaks = []
    for _ in range(3):
        mx.clear_cache()
        with memory_limit(1), track_memory() as memory:
            mx.eval(step(batch), state[0].state, state[1].state)
        peaks.append(memory.peak_bytes)
    assert predicted == pytest.approx(min(peaks), rel=0.02)
    assert predicted > beside.nbytes


def test_pages_that_hide_the_growth_of_close_sizes_are_not_a_batch_that_stopped_growing():
    page = 16384

    def paged(n):
        return -(-(1000 + 3000 * n) // page) * page

    forecast = Forecast(Asked(paged), ENDLESS, 20 * page)
    assert not forecast.flat
    assert forecast.knots[max(forecast.knots)] >= 20 * page
    assert Forecast(Asked(lambda n: paged(min(n, 40))), ENDLESS, 20 * page).flat
