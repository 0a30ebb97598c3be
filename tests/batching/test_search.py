"""The search over thousands of generated curves, against trying every size."""

import random
from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.batching.search import SizeMeasurement, search

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
        return SizeMeasurement(measured[size] <= budget, measured[size])

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


@pytest.mark.parametrize("off", [0.95, 1.0, 1.05])
def test_a_shape_that_is_off_by_a_few_per_cent_is_put_right_by_the_second_trial(off):
    """The shape is all that the first trial has; how far it is off can show where that decides, and not beyond."""
    for curve, budget in cases(affine):
        growth = curve(2) - curve(1)
        found, measured = run(curve, budget, shape=lambda n, curve=curve: off * curve(n) + 12345)
        answer = exhaustive(curve, budget)
        assert len(measured) <= 4
        # A shape that is too flat lets a trial go over by a part of its error; one that is not never does.
        assert max(measured.values()) <= (budget if off >= 1 else budget + max(0.05263 * growth, 0.012 * budget))
        missed = answer - found.size
        spare = (budget - curve(answer)) / growth
        assert missed == 0 or (missed == 1 and spare < off - 1)
        assert found.next_size == found.size + 1
        assert found.next_bytes > budget


def test_an_exact_shape_takes_three_trials_and_none_is_above():
    """Or four, in one search of several hundred whose first sizes lie close together."""
    taken = []
    for curve, budget in cases(affine):
        found, measured = run(curve, budget, shape=curve)
        assert found.size == exhaustive(curve, budget)
        assert max(measured.values()) <= budget
        taken.append(len(measured))
    assert sum(taken) / len(taken) <= 3
    assert max(taken) <= 4


def test_a_margin_keeps_machines_whose_peaks_depend_on_timing_below_the_budget():
    """What steps add is up to 1.5 % off the line, and the shape 3 %: without a margin half the searches go above."""
    above, taken, shares = {0.0: 0, 0.03: 0}, [], []
    for seed in range(400):
        rng = random.Random(seed)
        base, growth, off = rng.uniform(1e7, 3e9), rng.uniform(5e6, 2e8), rng.uniform(0.97, 1.03)
        budget = int(base + growth * rng.uniform(8, 300))
        expected = (budget - base) / growth

        def peak(n, seed=seed, base=base, slope=growth * off):
            return int(base + slope * n * random.Random(f"{seed} {n}").uniform(0.985, 1.015))

        for margin in above:
            measured = {}

            def measure(n, predicted, measured=measured, peak=peak, budget=budget, base=base):
                measured[n] = peak(n)
                return SizeMeasurement(measured[n] <= budget, measured[n], int(base))

            found = search(
                measure, range(1, 10**6), budget, margin=margin, start=max(0, int(expected / 8) - 1),
                shape=lambda n, base=base, growth=growth: base + growth * n,
            )  # fmt: skip
            above[margin] += max(measured.values()) > budget
        taken.append(len(measured))
        shares.append(found.size / max(n for n in range(1, int(1.2 * expected) + 2) if peak(n) <= budget))
        assert found.next_measured or found.next_bytes * 1.03 > budget
    assert above[0.0] >= 150
    assert above[0.03] <= 8  # two in a hundred
    assert sum(taken) / len(taken) <= 3.5
    assert max(taken) <= 6
    assert sum(shares) / len(shares) >= 0.96
    assert min(shares) >= 0.8


def bent(rng):
    """Flat, then straight: small batches need less than the optimizer's update does."""
    line, s = affine(rng)
    flat = line(rng.randint(2, 500))
    return lambda n: max(flat + s * n // 1000, line(n)), s


@pytest.mark.parametrize(("noise", "mean", "most"), [(0.0, 3.1, 4), (0.015, 4.5, 15)])
def test_a_bent_shape_is_followed_through_noise(noise, mean, most):
    """None far above, and the answer but for what the noise hides: a size in the thousands, too, in a few trials."""
    taken = []
    for i, (curve, budget) in enumerate(cases(bent, 300)):
        read = lambda n: int(curve(n) * (1 + noise * random.Random(f"{i} {n}").random()))  # noqa: E731, B023
        if curve(1) * (1 + noise) > budget:
            continue
        found, measured = run(read, budget, shape=curve)
        taken.append(len(measured))
        assert max(measured.values()) <= budget * (1 + 2 * noise)
        assert abs(curve(found.size) - budget) <= curve(found.size + 1) - curve(found.size) + 2 * noise * budget
    assert sum(taken) / len(taken) <= mean
    assert max(taken) <= most


def test_a_rough_shape_is_made_exact_where_it_decides():
    """Between its knots the shape is a chord; the search asks for a knot wherever it measures or rules out."""
    for curve, budget in cases(bent, 300):
        top = exhaustive(curve, budget)
        if top is None:
            continue
        knots = {1: curve(1), 2 * top + 1: curve(2 * top + 1)}

        def shape(n, knots=knots):
            near = sorted(knots, key=lambda k: abs(k - n))[:2]
            (a, b), (c, d) = ((k, knots[k]) for k in sorted(near))
            return b + (n - a) * (d - b) / (c - a)

        def look(n, knots=knots, curve=curve):
            known = n in knots
            knots[n] = curve(n)
            return not known

        found, measured = run(curve, budget, shape=shape, look=look)
        assert found.size == top
        assert max(measured.values()) <= budget
        assert {*measured, found.next_size} <= set(knots)


def test_peaks_that_leave_the_shape_are_searched_without_it():
    """A shape that is flatter by two thirds, and without the steps, costs trials and at most a step of the answer."""
    for curve, budget in cases(stepped, 300):
        line = (curve(4001) - curve(1)) / 4000
        found, measured = run(curve, budget, shape=lambda n, line=line: line * n / 3)
        answer = exhaustive(curve, budget)
        assert found.size is None if answer is None else answer - 16 <= found.size <= answer
        assert len(measured) <= 25


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


def test_small_sizes_that_hide_their_growth_do_not_lure_the_search_over_the_budget():
    """Below 500 the optimizer's update needs more than the batch does, and nothing tells how steep it is beyond."""
    base = 10**6

    def measure(size, predicted):
        measured[size] = peak(size)
        return SizeMeasurement(peak(size) <= budget, peak(size), base)

    for bend in (10, 100, 500):
        peak = lambda n: max(base + 500_000 + n, base + n * 500_000 // bend)  # noqa: E731, B023
        for factor in (1.2, 2, 4):
            budget, measured = int(base + factor * 500_000), {}
            found = search(measure, range(1, 10**6), budget)
            assert found.size == exhaustive(peak, budget)
            assert max(measured.values()) <= max(1.01 * budget + 500_000 // bend, base + 1.5 * 500_000)
            assert len(measured) <= 21


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


def dying_above(most, died):
    """Measures sizes of which those above one die without a number."""

    def measure(size, predicted):
        if size > most:
            died.append(size)
            return SizeMeasurement(False, None)
        return SizeMeasurement(True, 100 + size)

    return measure


def test_trials_that_die_without_a_number_are_halved_around():
    found = search(dying_above(37, []), range(1, 1000), 10**6)
    assert found.size == 37
    assert found.next_size == 38
    assert found.next_measured
    assert found.next_bytes is None


def test_sizes_that_die_below_what_the_shape_foresees_are_halved_around():
    died = []
    found = search(dying_above(37, died), range(1, 1000), 900, shape=lambda n: 100 + n)
    assert found.size == 37
    assert len(died) <= 10


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
