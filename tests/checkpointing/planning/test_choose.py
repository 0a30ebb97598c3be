"""The choice from numbers, against made-up models and machines whose answer is known."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.checkpointing.planning.choose import best_trial, calibrated, cheapest_fitting, limit_trials, relaxed
from mlx_tune.checkpointing.planning.schedule import frontier, price
from mlx_tune.measuring.step import StepTrial


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 99), st.data()
)
@settings(deadline=None, max_examples=100)
def test_the_chain_prices_what_is_known_of_the_whole_step(blocks, rest, data):
    saved, seconds = [s for s, _ in blocks], [float(t) for _, t in blocks]
    plain = rest + sum(saved)
    everything = data.draw(st.integers(0, plain))
    chain = calibrated(saved, seconds, plain, everything)
    n = len(blocks)
    assert price(chain, (False,) * n).peak_bytes <= plain
    assert price(chain, (True,) * n).peak_bytes <= everything
    if everything >= rest:  # the blocks save no more than all of them together
        assert price(chain, (False,) * n).peak_bytes == plain


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(0, 100))
@settings(deadline=None, max_examples=200)
def test_bisection_finds_the_first_choice_that_fits(floors, limit):
    floors = sorted(floors, reverse=True)
    choices = [(i,) for i in range(len(floors))]
    asked = []

    def floor(choice):
        asked.append(choice)
        return floors[choice[0]]

    expected = next((i for i, f in enumerate(floors) if f <= limit), None)
    assert cheapest_fitting(choices, floor, limit) == expected
    assert len(asked) <= 2 + len(floors).bit_length()


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=7),
    st.integers(0, 150),
)
@settings(deadline=None, max_examples=150)
def test_relaxing_never_makes_a_choice_slower_or_unfit(blocks, limit):
    saved = [b for b, _, _ in blocks]
    seconds = [float(t) for _, t, _ in blocks]
    kinds = [k for _, _, k in blocks]

    def floor(choice):
        return sum(b for b, yes in zip(saved, choice, strict=True) if not yes)

    start = tuple(True for _ in blocks)
    found = relaxed(start, kinds, seconds, floor, limit)
    assert floor(found) <= limit
    assert len(found) == len(start)
    one_fewer = [(*found[:i], False, *found[i + 1 :]) for i in range(len(found)) if found[i]]
    last = {kinds[i]: i for i in range(len(found)) if found[i]}
    assert all(floor((*found[:i], False, *found[i + 1 :])) > limit for i in last.values())
    assert bool(one_fewer) == any(found)


def test_the_estimate_overrules_the_sums():
    """Blocks whose savings the sums overrate: the bisection still ends at a choice that fits."""
    chain = calibrated([10] * 8, [1.0] * 8, 100, 20)
    choices = [s.checkpointed for s in frontier(chain)]

    def truth(choice):
        return 100 - 5 * sum(choice)

    found = choices[cheapest_fitting(choices, truth, 70)]
    best = min((c for c in product([False, True], repeat=8) if truth(c) <= 70), key=sum)
    assert sum(found) == sum(best) == 6


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
