"""The search over thousands of generated curves, against trying every size."""

import random
from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.batching.search import Measured, search

CURVES = 1000


def affine(rng):
    a, s = rng.randint(10**6, 10**9), rng.randint(10**4, 10**8)
    return lambda n: a + s * n, s


def stepped(rng):
    """Padded to a multiple: peaks stand still, then jump."""
    a, s, period = rng.randint(10**6, 10**9), rng.randint(10**4, 10**8), rng.randint(2, 16)
    phase = rng.randint(0, period - 1)
    return lambda n: a + s * period * ((n + phase) // period), s * period


def jumping(rng):
    """Another kernel from some sizes on."""
    a, s = rng.randint(10**6, 10**9), rng.randint(10**4, 10**8)
    jumps = [(rng.randint(4, 200), s * rng.randint(1, 40)) for _ in range(rng.randint(1, 4))]
    return lambda n: a + s * n + sum(height for at, height in jumps if n >= at), s


def noisy(rng):
    line, s = affine(rng)
    seed = rng.random()
    return lambda n: int(line(n) * (1 + 0.02 * random.Random(f"{seed} {n}").uniform(-1, 1))), s


def wild(rng):
    """Not even rising."""
    line, s = affine(rng)
    seed = rng.random()
    return lambda n: int(line(n) * (1 + 0.3 * random.Random(f"{seed} {n}").random())), s


def cases(kind, how_many=CURVES):
    """Curves with a budget somewhere above them."""
    for seed in range(how_many):
        rng = random.Random(f"{kind.__name__} {seed}")
        curve, growth = kind(rng)
        answer = rng.choice([rng.randint(1, 8), rng.randint(1, 64), rng.randint(1, 4000)])
        yield curve, curve(answer) + rng.randint(0, growth - 1)


def run(curve, budget, sizes=range(1, 10**9), **options):
    """The search's answer and what it measured; a size that was predicted not to fit, or measured twice, fails."""
    measured = {}

    def measure(size, predicted):
        assert size not in measured
        assert predicted is None or predicted <= budget
        measured[size] = curve(size)
        return Measured(measured[size] <= budget, measured[size])

    return search(measure, sizes, budget, **options), measured


def exhaustive(curve, budget, most=10**6):
    """The answer on a curve that never falls."""
    return bisect_right(range(1, most), budget, key=curve) or None


@pytest.mark.parametrize("kind", [affine, stepped, jumping])
def test_finds_what_trying_every_size_would_find(kind):
    for curve, budget in cases(kind):
        found, _ = run(curve, budget)
        assert found.size == exhaustive(curve, budget)


def test_straight_curves_take_four_trials_and_none_above_the_budget_but_for_the_tiniest_answers():
    for curve, budget in cases(affine):
        found, measured = run(curve, budget)
        assert len(measured) <= 4
        assert max(measured.values()) <= budget or found.size <= 2
        assert found.next_size == found.size + 1
        assert found.next_bytes > budget


def test_a_shape_that_is_off_by_a_few_per_cent_keeps_every_trial_within():
    for curve, budget in cases(affine):
        found, measured = run(curve, budget, shape=lambda n, curve=curve: 1.05 * curve(n) + 12345)
        assert found.size == exhaustive(curve, budget)
        assert len(measured) <= 4
        assert max(measured.values()) <= budget


def test_noise_costs_no_more_than_itself():
    for curve, budget in cases(noisy, 300):
        found, measured = run(curve, budget)
        if found.size is None:
            continue
        assert measured[found.size] <= budget
        assert found.next_measured is False or measured[found.next_size] > budget
        assert len(measured) <= 25


def test_wild_curves_end_with_a_size_that_was_seen_to_fit():
    for curve, budget in cases(wild, 300):
        found, measured = run(curve, budget)
        assert found.size is None or measured[found.size] <= budget
        assert len(measured) <= 40


@pytest.mark.parametrize("kind", [affine, stepped, jumping])
def test_only_the_given_sizes_are_answered(kind):
    for curve, budget in cases(kind, 300):
        sizes = tuple(n for n in range(1, 5041) if 5040 % n == 0)
        found, measured = run(curve, budget, sizes)
        fitting = [n for n in sizes if curve(n) <= budget]
        assert found.size == (fitting[-1] if fitting else None)
        assert set(measured) <= set(sizes)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(0, 900), st.integers(0, 59))
def test_any_rising_curve_ends_with_both_sides_of_the_budget_known(rises, budget, start):
    peaks = [sum(rises[: i + 1]) for i in range(len(rises))]
    sizes = range(1, len(rises) + 1)
    found, _ = run(lambda n: peaks[n - 1], budget, sizes, start=start)
    if found.size is None:
        assert peaks[0] > budget
    else:
        assert peaks[found.size - 1] <= budget
        if found.next_size is not None:
            assert found.next_bytes > budget
            assert not found.next_measured or peaks[found.next_size - 1] > budget


def test_trials_that_die_without_a_number_are_halved_around():
    died = []

    def measure(size, predicted):
        if size > 37:
            died.append(size)
            return Measured(False, None)
        return Measured(True, 100 + size)

    found = search(measure, range(1, 1000), 10**6)
    assert found.size == 37
    assert found.next_size == 38
    assert found.next_measured
    assert found.next_bytes is None


def test_the_largest_size_given_is_answered_without_looking_beyond():
    found, measured = run(lambda n: 10 * n, 10**9, range(1, 65))
    assert found.size == 64
    assert found.next_size is None
    assert 64 in measured


def test_a_start_that_does_not_fit_falls_back_to_the_smallest():
    found, measured = run(lambda n: 100 * n, 450, range(1, 100), start=50)
    assert found.size == 4
    assert list(measured)[:2] == [51, 1]


def test_nothing_fits():
    found, measured = run(lambda n: 100 * n, 50)
    assert found.size is None
    assert list(measured) == [1]
    assert (found.next_size, found.next_bytes, found.next_measured) == (1, 100, True)
