"""Which of two choices is faster, on made-up steps."""

import mlx.nn as nn
import pytest

import mlx_tune.checkpointing.planning.measure as measuring
from mlx_tune.checkpointing import is_checkpointed
from mlx_tune.checkpointing.planning.measure import ChoiceMeasurement, Measurements
from mlx_tune.checkpointing.planning.ways import Ways
from mlx_tune.measuring.step import StepTrial
from mlx_tune.progress import Bar


class Steps:
    """Steps of two blocks that take what they are told for each choice, one after the other."""

    def __init__(self, monkeypatch, seconds, peak=lambda limit: limit):
        self.model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
        self.seconds = {choice: iter(values) for choice, values in seconds.items()}
        self.peak, self.runs = peak, []
        monkeypatch.setattr(measuring, "run_step", self.run_step)
        self.real = Measurements(Ways(self.model, ("layers.0", "layers.1"), None), None, (), 1000, 2, Bar())

    def run_step(self, step, args, state=(), limit_bytes=None):
        choice = tuple(map(is_checkpointed, self.model.layers))
        self.runs.append((choice, limit_bytes))
        return StepTrial(limit_bytes, self.peak(limit_bytes), next(self.seconds[choice]))


ONE, BOTH = (True, False), (True, True)


def measured(choice, seconds):
    return ChoiceMeasurement(choice, 900, 900, seconds, True)


@pytest.mark.parametrize(
    ("one", "both", "winner"),
    [
        ([1.0] * 9, [0.8, 0.81, 0.8] * 3, BOTH),
        ([1.0] * 9, [1.1, 1.11, 1.1] * 3, ONE),
        ([1.0, 1.3] * 5, [1.29, 1.0] * 5, ONE),  # all noise: the favourite stays
    ],
)
def test_the_favourite_loses_to_a_clearly_faster_choice_only(monkeypatch, one, both, winner):
    steps = Steps(monkeypatch, {ONE: one, BOTH: both})
    assert steps.real.faster(measured(ONE, 1.0), measured(BOTH, 1.0)).choice == winner


def test_a_choice_that_took_much_longer_is_not_timed_again(monkeypatch):
    steps = Steps(monkeypatch, {})
    assert steps.real.faster(measured(ONE, 1.0), measured(BOTH, 1.2)).choice == ONE
    assert steps.runs == []


def test_a_faster_choice_that_leaves_the_budget_does_not_win(monkeypatch):
    steps = Steps(monkeypatch, {ONE: [1.0] * 9, BOTH: [0.5] * 9}, peak=lambda limit: 1001)
    assert steps.real.faster(measured(ONE, 1.0), measured(BOTH, 0.5)).choice == ONE


def test_a_choice_is_run_once_to_warm_up_and_fitted_once(monkeypatch):
    steps = Steps(monkeypatch, {ONE: [9.0, 1.1, 1.0]}, peak=lambda limit: 500)
    found = steps.real.fit(ONE, 400)
    assert (found.seconds, found.peak_bytes, found.fits, found.limit_bytes) == (1.0, 500, True, 833)
    assert steps.real.fit(ONE, 400) is found
    assert steps.runs == [(ONE, 833)] * 3
    assert not any(map(is_checkpointed, steps.model.layers))


def test_a_choice_over_the_budget_does_not_fit(monkeypatch):
    steps = Steps(monkeypatch, {BOTH: [1.0] * 20}, peak=lambda limit: 1100)
    assert not steps.real.fit(BOTH, 950).fits


def test_a_limit_is_lowered_until_the_peak_stays_within_the_budget(monkeypatch):
    steps = Steps(monkeypatch, {ONE: [1.0] * 20}, peak=lambda limit: round(1.15 * limit))
    held = steps.real.hold(measured(ONE, 0.5))
    assert held.fits
    assert [limit for _, limit in steps.runs] == [900, 900, 856, 856]  # 900 - 1.25 x 35
    assert (held.limit_bytes, held.peak_bytes, held.seconds) == (856, 984, 1.0)
    assert not any(map(is_checkpointed, steps.model.layers))


def test_a_choice_that_holds_is_run_once_more_and_keeps_its_limit(monkeypatch):
    steps = Steps(monkeypatch, {ONE: [1.0] * 20}, peak=lambda limit: 950)
    held = steps.real.hold(measured(ONE, 1.0))
    assert (held.fits, held.limit_bytes, held.peak_bytes, len(steps.runs)) == (True, 900, 950, 2)


def test_what_no_lower_limit_holds_does_not_fit(monkeypatch):
    steps = Steps(monkeypatch, {ONE: [1.0] * 20}, peak=lambda limit: 1100)
    assert not steps.real.hold(measured(ONE, 1.0)).fits
    assert [limit for _, limit in steps.runs[::2]] == [900, 775, 650, 525, 400]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_steps_at_least_decide_after_one_that_left_the_budget(monkeypatch, count):
    high = max(count, 2) - 1
    peaks = iter([900] * high + [1100] + [900] * high + [990] * 20)
    steps = Steps(monkeypatch, {ONE: [1.0] * 20}, peak=lambda limit: next(peaks))
    steps.real.steps = count
    held = steps.real.hold(measured(ONE, 1.0))
    assert (held.fits, held.peak_bytes, held.runs) == (True, 990, max(count, 2))


def test_how_often_a_limit_was_tried_since_a_peak_left_the_budget_is_known(monkeypatch):
    peaks = iter([0, 850, 850, 850, 1100, 700])  # the first step warms up
    steps = Steps(monkeypatch, {ONE: [1.0] * 20}, peak=lambda limit: next(peaks))
    found = steps.real.fit(ONE, 400)
    assert (found.fits, found.peak_bytes, found.runs) == (True, 850, 0)  # a higher limit left it since
    steps.real.once(found)
    assert (found.fits, found.peak_bytes, found.runs) == (True, 850, 1)
