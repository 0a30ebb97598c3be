"""The search for the smallest limit that costs no time: on exact curves, and on machines that scatter and drift."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune.measuring.limit_search import LimitSearch
from mlx_tune.measuring.step import StepTrial

GB = 10**9


class Machine:
    """A step's peaks and times under limits, with noise, drift, hiccups, ridges, and a cache that limits empty."""

    def __init__(self, seed: int) -> None:
        r = self.random = random.Random(seed)
        self.resident = r.uniform(1, 5)
        self.floor = self.resident * r.uniform(1.3, 2.5)
        self.free_peak = self.floor * r.uniform(1.15, 4)
        self.knee, self.overshoot = r.uniform(0.9 * self.floor, 0.97 * self.free_peak), r.uniform(0, 0.2)
        self.shape, self.steepness = r.choice(["linear", "step", "square"]), r.uniform(1.5, 8)
        self.ridge = (0.0, 0.0, 0.0)
        if r.random() < 0.4:
            begin = r.uniform(1.02 * self.knee, self.free_peak)
            self.ridge = begin, begin * r.uniform(1.02, 1.15), r.uniform(0.03, 0.08)
        self.noise, self.hiccups = r.uniform(0.01, 0.06), r.uniform(0, 0.05)
        self.drift, self.wave, self.emptied = r.uniform(-0.15, 0.15), r.uniform(0, 0.05), r.uniform(0, 0.05)
        self.steps, self.after_limit = 0, False

    def slowdown(self, limit: float) -> float:
        begin, end, height = self.ridge
        if begin <= limit <= end and height:
            return height
        below = max(0.0, (self.knee - limit) / self.knee)
        steep = self.steepness * below
        return {"linear": steep, "step": 0.15 * (below > 0) + steep, "square": 4 * steep * below}[self.shape]

    def peak(self, limit: float) -> float:
        return max(self.floor, min(self.free_peak, limit * (1 + self.overshoot)))

    def run(self, limit_bytes: int | None) -> StepTrial:
        self.steps += 1
        r, limit = self.random, math.inf if limit_bytes is None else limit_bytes / GB
        seconds = (1 + self.slowdown(limit)) * math.exp(r.gauss(0, self.noise))
        seconds *= (1 + self.drift * self.steps / 60) * (1 + self.wave * math.sin(self.steps / 7))
        seconds *= r.uniform(1.3, 3) if r.random() < self.hiccups else 1
        if limit_bytes is None:
            seconds *= 1 + self.emptied * self.after_limit
        peak = self.peak(limit) * (1 if limit_bytes is None else 1 + abs(r.gauss(0, 0.01)))
        self.after_limit = limit_bytes is not None
        return StepTrial(limit_bytes, int(peak * GB), seconds)

    @property
    def true_knee(self) -> float:
        """The smallest limit that costs at most two per cent."""
        span = self.free_peak - self.resident
        limits = (self.resident + span * i / 1000 for i in range(1001))
        return next((limit for limit in limits if self.slowdown(limit) <= 0.02), self.free_peak)


def answer(machine: Machine) -> float:
    search = LimitSearch(machine.run, slowdown=0.02)
    high = search.begin()
    trials = search.trials(int(machine.resident * GB), high, high // 100)
    return min((t.limit_bytes for t in trials if t.fits), default=high) / GB


def test_noise_drift_hiccups_and_ridges_seldom_fool_it() -> None:
    near = fast = 0
    for seed in range(300):
        machine = Machine(seed)
        found = answer(machine)
        near += abs(machine.peak(found) / machine.peak(machine.true_knee) - 1) <= 0.1
        fast += machine.slowdown(found) <= 0.1
        assert machine.steps <= 60
    assert near >= 0.95 * 300
    assert fast >= 0.95 * 300


def exact(fits, slow: float = 1.0):
    """A machine that never scatters; `slow` is the extra time where a limit does not fit."""
    return lambda limit: StepTrial(limit, limit or 10**7, 1.0 if limit is None or fits(limit) else 1 + slow)


@given(st.integers(0, 10**6), st.integers(10, 10**6), st.floats(0, 1), st.integers(1, 1000))
def test_without_noise_it_ends_within_the_resolution_of_the_knee(
    low: int, span: int, where: float, resolution: int
) -> None:
    high, knee = low + span, low + int(where * span)
    search = LimitSearch(exact(lambda limit: limit >= knee), slowdown=0.02, most_steps=10_000)
    search.begin()
    trials = search.trials(low, high, resolution)
    assert all(low < t.limit_bytes < high for t in trials)
    assert [t.fits for t in trials] == [t.limit_bytes >= knee for t in trials]
    best = min((t.limit_bytes for t in trials if t.fits), default=high)
    assert knee <= best <= max(knee, low) + resolution


@pytest.mark.parametrize("ridge", [(500, 800), (350, 420), (610, 990)])
def test_a_ridge_does_not_hide_a_smaller_limit(ridge: tuple[int, int]) -> None:
    run = exact(lambda limit: limit >= 300 and not ridge[0] <= limit < ridge[1], slow=0.1)
    search = LimitSearch(run, slowdown=0.02, most_steps=1000)
    search.begin()
    assert 300 <= min(t.limit_bytes for t in search.trials(0, 1000, 10) if t.fits) <= 320


def test_a_limit_that_fitted_by_luck_is_given_up() -> None:
    """One that looks fast at first and is slow from then on."""
    seen: dict[int, int] = {}

    def run(limit: int | None) -> StepTrial:
        if limit is None:
            return StepTrial(None, 1000, 1.0)
        seen[limit] = seen.get(limit, 0) + 1
        lucky = limit == 200 and seen[limit] <= 6  # all the steps of its first trial
        return StepTrial(limit, limit, 1.0 if limit >= 400 or lucky else 1.3)

    search = LimitSearch(run, slowdown=0.02)
    search.begin()
    trials = {t.limit_bytes: t for t in search.trials(0, 1000, 100)}
    assert seen[200] > 6
    assert not trials[200].fits
    assert min(t.limit_bytes for t in trials.values() if t.fits) >= 400


def test_the_highest_peak_counts_timed_or_not() -> None:
    peaks = iter([1000] * 4 + [150, 700, *[150] * 200])
    search = LimitSearch(lambda limit: StepTrial(limit, next(peaks), 1.0), slowdown=0.02)
    search.begin()
    assert search.trials(0, 1000, 500)[0].peak_bytes == 700


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_a_limit_that_fits_is_timed_no_more_than_asked_for_before_the_answer_is_asked_again(most: int) -> None:
    runs: list[int | None] = []

    def run(limit: int | None) -> StepTrial:
        runs.append(limit)
        return StepTrial(limit, 1000, 1.0 if len(runs) % 2 else 1.03)

    search = LimitSearch(run, slowdown=0.02, most_timed=most, most_steps=1000)
    search.begin()
    search.trials(0, 1000, 500)
    first = runs.index(200)
    again = len(runs) - runs[::-1].index(200)
    assert 1 <= runs[first:again].count(200) <= 3 * max(1, math.ceil(most / 2)) + 3
