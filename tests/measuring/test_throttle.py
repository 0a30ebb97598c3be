"""How peaks follow a memory limit."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.measuring.step import StepTrial
from mlx_tune.measuring.throttle import SHARES, Throttle, best_trial, limit_trials


def test_without_readings_everything_is_held_back():
    assert Throttle().share_within(10.0) == 0.0
    assert Throttle().spread == 1.0
    assert Throttle.limit_at(0.0, 100, 200, 1000) == 1


@pytest.mark.parametrize(("room", "share"), [(1.0, 0.3), (1.05, 0.3), (1.1, 0.6), (1.39, 0.9), (2.0, math.inf)])
def test_the_largest_share_that_stays_within_the_room(room, share):
    throttle = Throttle(dict(zip(SHARES, (1.0, 1.0, 1.1, 1.3, 1.4, 1.9), strict=True)))
    assert throttle.share_within(room) == share


def test_a_share_above_one_that_peaked_is_not_taken_though_it_was_low_itself():
    assert Throttle({0.0: 1.0, 0.3: 1.2, 0.6: 1.0}).share_within(1.1) == 0.0


def test_the_worst_reading_counts():
    throttle = Throttle()
    for peak in (1.0, 1.1, 1.05):
        throttle.note(0.0, peak)
    assert throttle.spread == 1.1


def test_limits_lie_between_what_was_there_and_the_budget():
    assert Throttle.limit_at(0.6, 100, 200, 1000) == 160
    assert Throttle.limit_at(1.2, 100, 200, 210) == 210
    assert Throttle.limit_at(math.inf, 100, 200, 1000) == 1000
    assert Throttle.limit_at(0.3, 100, 100, 1000) == 1000  # a step that adds nothing needs no holding back


def test_another_reading_is_taken_only_where_there_is_room_for_it():
    throttle = Throttle({0.0: 1.1})
    assert not throttle.may_try(1.5)
    assert throttle.may_try(1.8)


class Machine:
    """Steps with a floor, a free peak, and a peak that lies above the limit between them."""

    def __init__(self, floor, free, overshoot):
        self.floor, self.free, self.overshoot, self.limits = floor, free, overshoot, []

    def run(self, limit):
        self.limits.append(limit)
        peak = min(self.free, max(self.floor, limit + self.overshoot))
        return StepTrial(limit, peak, 1.0 + max(0, self.floor - limit) / self.floor)


@given(st.integers(1000, 10_000), st.floats(1.0, 2.0), st.floats(0.0, 0.2), st.floats(1.0, 3.0))
@settings(deadline=None, max_examples=300)
def test_a_limit_is_found_wherever_the_floor_fits(floor, free, overshoot, room):
    """For overshoots of up to 20 % of the floor, as they are seen."""
    machine = Machine(floor, int(floor * free), int(floor * overshoot))
    budget = int(floor * room)
    trials = limit_trials(machine.run, floor, budget)
    assert len(trials) <= 4
    assert best_trial(trials, budget) is not None
    assert all(t.limit_bytes <= budget for t in trials)


def test_the_first_limit_leaves_room_for_the_overshoot():
    machine = Machine(floor=100, free=10_000, overshoot=160)
    trials = limit_trials(machine.run, 100, 1000)
    assert max(t.peak_bytes for t in trials) <= 1000
    assert machine.limits[0] == 833


def test_the_limit_is_raised_by_what_the_overshoot_leaves():
    machine = Machine(floor=100, free=10_000, overshoot=20)
    trials = limit_trials(machine.run, 100, 1000)
    assert machine.limits == [833, 975]
    assert best_trial(trials, 1000).peak_bytes == 995


def test_one_trial_is_enough_where_the_limit_does_not_bind():
    machine = Machine(floor=100, free=300, overshoot=20)
    assert len(limit_trials(machine.run, 100, 1000)) == 1


def test_nothing_fits_where_the_floor_was_underestimated():
    machine = Machine(floor=1100, free=2000, overshoot=10)
    trials = limit_trials(machine.run, 990, 1000)
    assert best_trial(trials, 1000) is None


def test_the_highest_limit_that_fits_is_the_best_however_long_it_happened_to_take():
    trials = [StepTrial(10, 10, 1.0), StepTrial(20, 20, 1.1), StepTrial(30, 30, 0.1)]
    assert best_trial(trials, 25) is trials[1]


@settings(deadline=None)
@given(st.lists(st.floats(0.9, 1.1), min_size=8, max_size=8), st.integers(700, 1000))
def test_no_limit_is_chosen_above_one_that_was_seen_to_break_the_budget(scatter, floor):
    """A peak that stays within the budget under a higher limit is a low one."""
    luck = iter(scatter)

    def run(limit):
        return StepTrial(limit, round(max(floor, min(1200, limit * 1.05)) * next(luck)), 1.0)

    trials = limit_trials(run, floor, 1000)
    assert len(trials) <= 4
    best = best_trial(trials, 1000)
    if best is not None:
        assert all(t.peak_bytes <= 1000 or t.limit_bytes > best.limit_bytes for t in trials)


def test_a_limit_is_not_raised_past_one_that_broke_the_budget():
    peaks = iter([1010, 700, 900, 1001])
    trials = limit_trials(lambda limit: StepTrial(limit, next(peaks), 1.0), 700, 1000)
    assert max(t.limit_bytes for t in trials[1:]) < trials[0].limit_bytes
    assert best_trial([StepTrial(10, 30, 1.0), StepTrial(20, 20, 1.0)], 25) is None
