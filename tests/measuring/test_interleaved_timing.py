"""Races on made-up machines: quiet ones, and ones that slow down for a while or hiccup."""

import math
import random
from functools import partial

import pytest

from mlx_tune.measuring.interleaved_timing import compare, race


class Machine:
    """Runs ways that take these seconds, times whatever the machine does at the moment."""

    def __init__(self, *seconds, seed=0, drift=0.0, hiccups=0.0, jitter=0.0):
        self.seconds, self.random = seconds, random.Random(seed)
        self.drift, self.hiccups, self.jitter = drift, hiccups, jitter
        self.load, self.runs = 0.0, []

    def run(self, i):
        self.runs.append(i)
        self.load += self.random.gauss(0, self.drift)
        factor = math.exp(self.load + self.random.gauss(0, self.jitter))
        if self.random.random() < self.hiccups:
            factor *= 3
        return self.seconds[i] * factor

    def race(self, tolerance=0.02, most_turns=6):
        ways = [partial(self.run, i) for i in range(len(self.seconds))]
        return race(ways, tolerance=tolerance, most_turns=most_turns)


def test_a_quiet_machine_is_exact_and_needs_three_turns():
    machine = Machine(1.3, 1.0, 1.1, 1.01)
    assert [s.behind for s in machine.race()] == pytest.approx([0.3, 0.0, 0.1, 0.01])
    assert len(machine.runs) == 3 * 4


def test_hopeless_ways_leave_early():
    machine = Machine(1.0, 4.5, 1.5, 1.01)
    machine.race()
    assert [machine.runs.count(i) for i in range(4)] == [3, 1, 2, 3]


def test_one_hiccup_makes_no_way_hopeless():
    times = iter([3.0, 0.9, 0.9, 0.9, 0.9])
    standings = race([lambda: 1.0, lambda: next(times)], tolerance=0.02, most_turns=5)
    assert standings[1].behind == 0


def test_one_way_alone_is_not_run():
    machine = Machine(1.0)
    assert [s.behind for s in machine.race()] == [0.0]
    assert machine.runs == []


def test_a_way_that_gives_up_is_last():
    standings = race([lambda: 1.0, lambda: math.inf], tolerance=0.02, most_turns=5)
    assert [s.behind for s in standings] == [0.0, math.inf]
    assert [math.isinf(s.behind) for s in race([lambda: math.inf] * 2, tolerance=0.02, most_turns=5)] == [True, True]


def test_a_way_that_gives_up_later_is_last():
    times = iter([0.9, 1.1, math.inf])
    ways = [lambda: 1.0, lambda: next(times)]
    assert [s.behind for s in race(ways, tolerance=0, most_turns=5)] == [0.0, math.inf]


def test_where_the_fastest_gives_up_a_slow_one_that_had_left_wins():
    times = iter([1.0, math.inf])
    seconds = iter([1.1, math.inf])
    ways = [lambda: 3.0, lambda: next(times), lambda: next(seconds)]
    assert [s.behind for s in race(ways, tolerance=0, most_turns=5)] == [0.0, math.inf, math.inf]


@pytest.mark.parametrize(
    "unrest",
    [{"drift": 0.25}, {"hiccups": 0.1, "jitter": 0.02}, {"drift": 0.1, "jitter": 0.05}],
    ids=["drifting", "hiccuping", "both"],
)
def test_a_restless_machine_chooses_well_nearly_always(unrest):
    losses = []
    for seed in range(200):
        machine = Machine(1.0, 1.08, 1.4, 1.8, seed=seed, **unrest)
        standings = machine.race()
        chosen = min(range(4), key=lambda i: standings[i].behind)
        losses.append(machine.seconds[chosen] - 1)
    assert sum(losses) / 200 < 0.03
    assert sorted(losses)[int(0.95 * 200)] <= 0.08 + 1e-9


def test_the_clearer_the_difference_the_fewer_the_turns():
    few, many = (Machine(1.0, ratio, jitter=0.02, seed=1) for ratio in (1.3, 1.025))
    few.race(most_turns=20)
    many.race(most_turns=20)
    assert len(few.runs) < len(many.runs) <= 40


def test_times_of_nothing_do_not_break_it():
    assert [s.behind for s in race([lambda: 1e-9, lambda: 1e-9], tolerance=0.02, most_turns=3)] == [0.0, 0.0]


def replay(values):
    values = iter(values)
    return lambda: next(values)


def test_a_clear_difference_needs_few_turns_and_a_close_one_all():
    clear = compare(replay([1.0, 1.1, 1.0] * 4), replay([2.0, 2.1, 2.0] * 4), threshold=1.02, most_turns=10)
    assert clear.turns == 3
    assert clear.ratio == pytest.approx(2.0, rel=0.1)
    close = compare(replay([1.0, 1.1] * 5), replay([1.1, 1.0] * 5), threshold=1.02, most_turns=10)
    assert close.turns == 10


def test_the_order_alternates_within_the_turns():
    order = []

    def timed(name):
        def run():
            order.append(name)
            return 1.0

        return run

    compare(timed("a"), timed("b"), threshold=1.0, most_turns=4)
    assert "".join(order) == "abbaabba"


def test_one_spoiled_turn_does_not_move_the_ratio():
    found = compare(lambda: 1.0, replay([1.0, 1.0, 50.0, 1.0, 1.0]), threshold=1.0, most_turns=5)
    assert found.ratio == 1.0
