"""The search on made-up machines whose fastest setting is known: quiet ones, restless ones, ones that surprise."""

import math
import random
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_tune.checkpointing.planning.measure as measuring
from mlx_tune import BudgetError, is_checkpointed
from mlx_tune.checkpointing.planning.ways import Ways
from mlx_tune.fitting.autofit import _setting
from mlx_tune.fitting.search import EVERY, PLAIN, USUAL, Search
from mlx_tune.fitting.trials import Trials
from mlx_tune.measuring.ranks import Ranks
from mlx_tune.measuring.step import StepTrial
from mlx_tune.progress import Bar

pytestmark = pytest.mark.usefixtures("quick_garbage")

BLOCKS = 4
#: Bytes: the model, what a row always needs, and what a plain block holds for each row.
MODEL, ROW, HELD = 10_000, 200, 100


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1)


class MadeUpSurvey:
    """What a search asks of `Survey`, from formulas."""

    def __init__(self, again):
        self.model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.paths = tuple(f"layers.{i}" for i in range(BLOCKS))
        self.none, self.all = (False,) * BLOCKS, (True,) * BLOCKS
        self.choices = [tuple(i < n for i in range(BLOCKS)) for n in range(BLOCKS + 1)]
        self.kinds, self.again, self.batch_size = [0] * BLOCKS, again, 1
        self.state = None
        self.ways = Ways(self.model, self.paths, lambda batch: None)

    @property
    def extra_seconds(self):
        return [self.again * self.batch_size] * BLOCKS

    def study(self, *_):
        pass

    def release(self):
        pass

    def make_batch(self, n):
        return mx.zeros((n, 1), dtype=mx.int32)

    def extra(self, choice):
        return sum(choice) * self.again * self.batch_size

    def floor(self, choice, n=None):
        return MODEL + (n or self.batch_size) * (ROW + HELD * (BLOCKS - sum(choice)))


class Machine:
    """Steps of `fixed + n * (row + again * checkpointed blocks)` seconds, times what the machine does at the moment.

    Without a limit a step peaks at `ahead` times its floor; a limit below that holds it back, at a price.
    """

    def __init__(self, monkeypatch, fixed, row, again, *, seed=0, drift=0.0, jitter=0.0, hiccups=0.0, ahead=1.1):
        self.survey = MadeUpSurvey(again)
        self.fixed, self.row, self.again, self.ahead = fixed, row, again, ahead
        self.random, self.load = random.Random(seed), 0.0
        self.drift, self.jitter, self.hiccups = drift, jitter, hiccups
        self.runs = []
        self.overshoot = lambda: 0.005
        monkeypatch.setattr(measuring, "run_step", self.run_step)

    def seconds(self, n, blocks):
        return self.fixed + n * (self.row + self.again * blocks)

    def rate(self, n, blocks):
        return n / self.seconds(n, blocks)

    def run_step(self, step, args, state, limit):
        n, blocks = args[0].shape[0], sum(map(is_checkpointed, self.survey.model.layers))
        self.runs.append((n, blocks, limit))
        self.load += self.random.gauss(0, self.drift)
        slow = math.exp(self.load + self.random.gauss(0, self.jitter))
        slow *= 3 if self.random.random() < self.hiccups else 1
        floor = self.survey.floor(tuple(i < blocks for i in range(BLOCKS)), n)
        free = self.ahead * floor
        peak = min(free, max(floor, limit * (1 + self.overshoot())))
        held_back = 1 + 0.5 * max(0.0, 1 - limit / free)
        return StepTrial(limit, round(peak), self.seconds(n, blocks) * slow * held_back)

    def largest(self, blocks, budget):
        n = 1
        while self.survey.floor(tuple(i < blocks for i in range(BLOCKS)), n + 1) * 1.03 <= budget:
            n += 1
        return n

    def search(self, budget, sizes=range(1, 1 << 32), keep_usual=True, recover=lambda: None, **options):
        bar = Bar()
        options = {"steps": 2, "throttle": True, "tolerance": 0.01, **options}
        trials = Trials(self.survey, budget, ranks=Ranks(None), recover=recover, bar=bar, **options)
        search = Search(self.survey, sizes, trials, bar)
        return search, search.run(keep_usual)

    def best_known(self, budget):
        """The rate of the best of what anybody would try."""
        plain = self.largest(0, budget)
        simple = [(plain, 0), (self.largest(BLOCKS, budget), BLOCKS), *([(4, 0)] if plain >= 4 else [])]
        return max(self.rate(*setting) for setting in simple)


QUIET = [
    (1.0, 0.01, 0.0001),  # the fixed part rules: the largest batch there can be
    (1.0, 0.1, 0.01),
    (1.0, 0.1, 0.05),  # computing twice costs as much as a larger batch gains
    (0.05, 0.1, 0.01),
    (0.0, 0.1, 0.03),  # time in proportion: nothing larger is faster
]


@pytest.mark.parametrize("budget", [13_000, 25_000, 200_000])
@pytest.mark.parametrize(("fixed", "row", "again"), QUIET)
def test_on_a_quiet_machine_nothing_that_anybody_would_try_is_faster(monkeypatch, fixed, row, again, budget):
    machine = Machine(monkeypatch, fixed, row, again, ahead=1.0)
    _, best = machine.search(budget)
    assert machine.rate(best.batch_size, sum(best.choice)) >= 0.99 * machine.best_known(budget)
    assert best.peak_bytes <= budget
    assert all(limit <= budget for _, _, limit in machine.runs)
    assert len(machine.runs) <= 80


@pytest.mark.parametrize(
    "unrest",
    [{"drift": 0.15}, {"hiccups": 0.1, "jitter": 0.03}, {"drift": 0.08, "jitter": 0.08}],
    ids=["drifting", "hiccuping", "both"],
)
@pytest.mark.parametrize(("fixed", "row", "again"), QUIET)
def test_on_a_restless_machine_next_to_nothing_is_lost(monkeypatch, fixed, row, again, unrest):
    budget, lost = 40_000, []
    for seed in range(24):
        machine = Machine(monkeypatch, fixed, row, again, seed=seed, ahead=1.0, **unrest)
        _, best = machine.search(budget)
        lost.append(1 - machine.rate(best.batch_size, sum(best.choice)) / machine.best_known(budget))
    assert sum(lost) / len(lost) < 0.02
    assert sum(loss > 0.1 for loss in lost) <= 1


def test_what_anybody_would_try_is_run_and_named(monkeypatch):
    machine = Machine(monkeypatch, 0.3, 0.1, 0.002)
    search, _ = machine.search(25_000)
    named = {c.known_as: (c.batch_size, sum(c.choice)) for c in search.candidates if c.known_as}
    assert named == {
        PLAIN: (machine.largest(0, 25_000), 0),
        EVERY: (machine.largest(BLOCKS, 25_000), BLOCKS),
        USUAL: (4, 0),
    }
    assert set(named.values()) <= {(n, blocks) for n, blocks, _ in machine.runs}


def test_one_setting_may_be_all_that_anybody_would_try(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.1, 0.0)
    search, best = machine.search(MODEL + 4 * 600 + 400, sizes=[4])
    assert [c.known_as for c in search.candidates] == [f"{PLAIN}, {USUAL}", EVERY]
    assert best.batch_size == 4


def test_hopeless_checkpointing_is_not_run_and_said(monkeypatch):
    machine = Machine(monkeypatch, 0.0, 0.1, 0.02)
    search, _ = machine.search(25_000)
    assert all(blocks == 0 for _, blocks, _ in machine.runs)
    assert "with every block checkpointed) was not run: it is predicted to be 4" in search.notes[0]


def test_long_steps_that_gain_nothing_are_not_run_and_that_is_said(monkeypatch):
    machine = Machine(monkeypatch, 0.0, 0.1, 0.02)
    search, _ = machine.search(1_000_000)  # 1,600 rows: nearly three minutes a step
    assert max(n for n, _, _ in machine.runs) < 600
    assert any("a step is predicted to take 2 min" in note and "gain nothing" in note for note in search.notes)


def test_of_equally_fast_settings_the_lowest_peak_wins_but_no_batch_below_the_usual_one(monkeypatch):
    machine = Machine(monkeypatch, 0.0, 0.1, 0.02)
    assert machine.search(25_000)[1].batch_size == 4
    assert machine.search(25_000, keep_usual=False)[1].batch_size == 1


def test_a_smaller_batch_than_the_usual_one_wins_where_it_is_faster(monkeypatch):
    machine = Machine(monkeypatch, 0.0, 0.1, 0.02)
    machine.seconds = lambda n, blocks: n * (0.1 + 0.02 * blocks) * (1 if n < 3 else 1.3)
    assert machine.search(25_000)[1].batch_size < 3


def test_where_no_batch_fits_without_checkpoints_larger_ones_are_still_found(monkeypatch):
    """Time is not in proportion to the batch: only runs at several sizes show it."""
    machine = Machine(monkeypatch, 1.0, 0.01, 0.0001, ahead=1.0)
    machine.survey.floor = lambda choice, n=None: MODEL + (n or 1) * (50 + 1000 * (BLOCKS - sum(choice)))
    search, best = machine.search(MODEL + 4000)
    assert all(any(c.choice) for c in search.candidates)
    assert sum(best.choice) == BLOCKS
    assert best.batch_size == max(c.batch_size for c in search.candidates) > 30


def test_a_held_back_setting_is_tried_with_fewer_rows(monkeypatch):
    """At the largest batch that fits the limit costs more than the last rows gain."""
    machine = Machine(monkeypatch, 0.5, 0.1, 0.05, ahead=1.15)
    budget = machine.survey.floor(machine.survey.none, 40)
    search, best = machine.search(budget)
    largest = machine.largest(0, budget)
    roomy = max(c.batch_size for c in search.candidates if c.floor_bytes * 1.2 <= budget and not any(c.choice))
    assert (best.batch_size, sum(best.choice)) == (roomy, 0)
    assert 0.6 * largest < roomy < largest
    assert next(c for c in search.candidates if c.batch_size == largest).held_back


def test_a_limit_that_no_longer_holds_is_lowered(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.01, 0.05, ahead=1.5)
    budget = 30_000
    runs_before_it_gets_worse = 12
    machine.overshoot = lambda: 0.02 if len(machine.runs) < runs_before_it_gets_worse else 0.06
    _, best = machine.search(budget)
    assert best.peak_bytes <= budget
    limits = [limit for n, blocks, limit in machine.runs if (n, blocks) == (best.batch_size, sum(best.choice))]
    assert best.measured.limit_bytes == limits[-1] < max(limits)


def test_without_throttling_a_setting_that_breaks_the_budget_is_left_out(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.01, 0.05, ahead=1.15)
    plain = machine.run_step

    def run_step(step, args, state, limit):
        trial = plain(step, args, state, limit)
        worse = 1.2 if len(machine.runs) > 20 and args[0].shape[0] > 10 else 1.0
        return StepTrial(limit, round(trial.peak_bytes * worse), trial.seconds)

    monkeypatch.setattr(measuring, "run_step", run_step)
    search, best = machine.search(30_000, throttle=False)
    assert best.fits
    assert best.batch_size <= 10
    assert any(c.measured and not c.fits for c in search.candidates)


def test_a_setting_that_no_limit_holds_any_more_is_left_out_with_its_figures(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.01, 0.05, ahead=1.1)
    plain = machine.run_step

    def run_step(step, args, state, limit):
        trial = plain(step, args, state, limit)
        broken = len(machine.runs) > 12 and args[0].shape[0] > 10
        return StepTrial(limit, 2 * trial.peak_bytes if broken else trial.peak_bytes, trial.seconds)

    monkeypatch.setattr(measuring, "run_step", run_step)
    search, best = machine.search(30_000)
    assert best.fits
    assert best.batch_size <= 10
    measured = [c.measured for c in search.candidates if c.measured]
    assert any(not m.fits for m in measured)
    for m in measured:
        assert math.isfinite(m.seconds)
        assert m.fits == (0 < m.peak_bytes <= 30_000)


def test_where_every_setting_breaks_the_budget_that_is_an_error(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.01, 0.0001, ahead=1.5)
    machine.overshoot = lambda: 10.0
    with pytest.raises(
        BudgetError, match=r"Batch size 1 does not fit .* 4 of 4 blocks checkpointed .* and it peaked at"
    ):
        machine.search(MODEL + 600)


def test_running_out_of_memory_is_not_fitting(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.01, 0.0001, ahead=1.0)
    plain, recovered = machine.run_step, []

    def run_step(step, args, state, limit):
        trial = plain(step, args, state, limit)
        if args[0].shape[0] > 20:
            raise RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory")
        return trial

    monkeypatch.setattr(measuring, "run_step", run_step)
    search, best = machine.search(25_000, recover=lambda: recovered.append(1))
    assert 4 <= best.batch_size <= 20
    assert recovered
    assert not any(c.fits for c in search.candidates if c.batch_size > 20)
    died = [c for c in search.candidates if c.died]
    assert died
    for candidate in died:  # its figures are no measurements
        setting = _setting(candidate, search, False, True)
        assert (setting.fits, setting.peak_bytes, setting.seconds, setting.rate) == (False, None, None, None)
    assert "and it ran out of memory. " in str(search.trials.nothing_fits(died[0]))


def test_other_errors_of_a_step_are_the_users_to_see(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.01, 0.0001)

    def run_step(step, args, state, limit):
        raise RuntimeError("[matmul] Last dimension of first input with shape (2,3)")

    monkeypatch.setattr(measuring, "run_step", run_step)
    with pytest.raises(RuntimeError, match="Last dimension"):
        machine.search(25_000)


def test_only_the_batch_that_runs_is_held(monkeypatch):
    machine, batches = Machine(monkeypatch, 1.0, 0.1, 0.01), []
    make_batch, plain = machine.survey.make_batch, machine.run_step

    def make_and_note(n):
        batch = make_batch(n)
        batches.append(weakref.ref(batch))
        return batch

    held = []

    def run_step(step, args, state, limit):
        held.append(sum(reference() is not None for reference in batches))
        return plain(step, args, state, limit)

    machine.survey.make_batch = make_and_note
    monkeypatch.setattr(measuring, "run_step", run_step)
    machine.search(25_000)
    assert len(batches) > 5
    assert set(held) == {1}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("scatter", [0.02, 0.06, 0.15])
def test_a_setting_is_chosen_on_two_steps_since_one_that_left_the_budget(monkeypatch, scatter, steps):
    """And its peak is the highest under its limit since then."""
    budget, broken, lost, runs = 40_000, 0, [], []
    for seed in range(12):
        machine = Machine(monkeypatch, 1.0, 0.1, 0.01, seed=seed, ahead=1.4)
        draw, plain, peaks = random.Random(seed), machine.run_step, []

        def run_step(step, args, state, limit, draw=draw, plain=plain, peaks=peaks, machine=machine):
            trial = plain(step, args, state, limit)
            peak = round(trial.peak_bytes * (1 + scatter * (draw.random() < 0.3)))
            peaks.append((*machine.runs[-1], peak))
            return StepTrial(limit, peak, trial.seconds)

        monkeypatch.setattr(measuring, "run_step", run_step)
        _, best = machine.search(budget, steps=steps)
        own = [(limit, peak) for n, blocks, limit, peak in peaks if (n, blocks) == (best.batch_size, sum(best.choice))]
        last = max((i for i, (_, peak) in enumerate(own) if peak > budget), default=-1)
        since = [peak for limit, peak in own[last + 1 :] if limit == best.measured.limit_bytes]
        assert len(since) >= 2
        assert max(since) <= best.peak_bytes <= budget
        broken += last >= 0
        lost.append(1 - machine.rate(best.batch_size, sum(best.choice)) / machine.best_known(budget))
        runs.append(len(peaks))
    assert broken  # it was put to the test
    assert sum(lost) / len(lost) < 0.1
    assert sum(runs) / len(runs) < 100
