"""How peaks follow a memory limit."""

import math

import pytest

from mlx_tune.measuring.throttle import SHARES, Throttle


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
