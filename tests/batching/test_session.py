"""One search over a machine that is made of numbers: floors, limits and rates are formulas here."""

from bisect import bisect_right
from dataclasses import dataclass, field, replace

import pytest

from mlx_tune.batching.result import Trial
from mlx_tune.batching.session import Session
from mlx_tune.errors import TraceError
from mlx_tune.measuring.floors import Floor
from mlx_tune.progress import Bar

BUDGET = 10_000
BASE = 1000


def floor(n):
    return BASE + 100 * n


@dataclass
class Machine:
    """Steps peak at their floor when held back and 30 % above it when free; held back, they lose time."""

    tried: list = field(default_factory=list)
    free: float = 1.3
    cost: float = 0.5
    scatter: float = 0.0

    def trial(self, size, predicted_bytes, steps):
        assert predicted_bytes is None or predicted_bytes <= BUDGET
        self.tried.append((size, steps))
        held, running = floor(size), BASE + self.free * 100 * size
        slow = max(0.0, running - BUDGET) / BUDGET
        return [
            Trial(
                size,
                predicted_bytes,
                limit_bytes=BUDGET if running <= BUDGET else held,
                peak_bytes=round(min(running, max(held, BUDGET))) if running <= BUDGET else held + 1,
                seconds=size * (1 + self.cost * slow),
                fits=held <= BUDGET,
                items=size,
                floor_bytes=held,
                held_bytes=held + round(self.scatter * 100 * size),
                base_bytes=BASE,
                steps=steps,
            )
        ]


def session(machine, sizes=range(1, 10**6), estimate=floor, made=False):
    search = Session(machine, sizes, BUDGET, 2, Bar())
    if estimate is not None:
        search.look_ahead(lambda n: Floor(estimate(n)), lambda n, least: made)
    return search


def test_an_estimate_makes_three_trials_of_it():
    machine = Machine()
    found = session(machine).largest()
    assert (found.size, found.next_size, found.next_measured) == (90, 91, False)
    assert len(machine.tried) == 3
    assert machine.tried[-1] == (90, 2)


def test_the_first_trial_is_small():
    machine = Machine()
    session(machine).largest()
    assert 1 <= machine.tried[0][0] <= 90 / 8


def test_a_step_that_cannot_be_read_starts_with_two_small_trials():
    def unreadable(size):
        raise TraceError("it evaluates\nat line 3")

    machine = Machine()
    search = session(machine, estimate=unreadable)
    assert search.largest().size == 90
    assert [size for size, _ in machine.tried[:2]] == [1, 2]
    assert search.notes == ["small trials took the place of an estimate from the step's graph: it evaluates"]


@pytest.mark.parametrize("known_before", [True, False])
def test_a_smallest_size_that_is_predicted_above_the_budget_is_not_run(known_before):
    """Before the first step, or once the optimizer's state is there."""
    machine, readings = Machine(), iter([12_000] if known_before else [9_000, 12_000, 12_000])
    search = session(machine, range(110, 111), estimate=lambda n: next(readings), made=True)
    assert search.largest().size is None
    assert machine.tried == []
    assert search.trials == [Trial(110, 12_000, limit_bytes=BUDGET, reason="predicted, not tried")]


def test_the_expected_answer_takes_its_steps_at_once():
    """Its share of the budget may be small where sizes are far apart."""
    machine = Machine()
    assert session(machine, (8, 16, 32, 64, 128)).largest().size == 64
    assert machine.tried[-1] == (64, 2)
    assert [size for size, _ in machine.tried].count(64) == 1


def test_scatter_is_kept_clear_of_the_budget_but_not_at_the_cost_of_a_size_that_lies_far_below_it():
    fine, coarse = Machine(scatter=0.09), Machine(scatter=0.09)
    assert session(fine).largest().size == 82  # 1000 + 1.09 * 100 * 82 = 9938
    assert session(coarse, range(14, 1400, 14)).largest().size == 84  # 9400, or 10156 at the most
    assert session(coarse, range(14, 1400, 14)).largest().next_bytes > BUDGET


def test_an_answer_that_is_not_accepted_gives_way_to_the_next_smaller_one():
    machine = Machine()
    search = session(machine)
    found = search.largest(lambda trial: "wrong loss" if trial.batch_size > 80 else None)
    assert found.size == 80
    assert found.next_measured
    assert {trial.reason for trial in search.trials if trial.batch_size > 80 and not trial.fits} == {"wrong loss"}


@pytest.mark.parametrize("slowdown", [0.01, 0.05, 10.0])
def test_slowdown_is_measured_against_the_largest_size_that_runs_free(slowdown):
    machine = Machine()
    search = session(machine)
    answer = search.largest().size
    size = search.within_slowdown(answer, slowdown)
    lost = lambda n: 0.5 * max(0.0, BASE + 130 * n - BUDGET) / BUDGET  # noqa: E731
    exact = min(90, bisect_right(range(1, 200), slowdown + 1e-9, key=lost))
    assert exact - 1 <= size <= exact
    assert (size < answer) == any("batch 90 fits as well, but is slower" in note for note in search.notes)


def test_what_runs_free_is_known_without_trying_it():
    search = session(Machine())
    answer = search.largest().size
    assert search.unhindered(answer) == 69  # 1000 + 1.3 * 100 * 69 = 9970
    assert session_answer(Machine(free=1.0)) == 90


def session_answer(machine):
    search = session(machine)
    return search.unhindered(search.largest().size)


def test_where_nothing_runs_free_slowdown_has_nothing_to_hold_against():
    search = session(Machine(free=200.0))
    answer = search.largest().size
    assert search.unhindered(answer) is None
    assert search.within_slowdown(answer, 0.05) == answer
    assert "slowdown=0.05 could not be held to: at each size the limit made MLX wait" in search.notes[0]


@dataclass
class Stalling(Machine):
    """Sizes from `cliff` on take so much longer a row, each again than the one before."""

    cliff: int = 88
    factor: float = 1.2
    lucky: bool = False

    def trial(self, size, predicted_bytes, steps):
        [trial] = super().trial(size, predicted_bytes, steps)
        first = [n for n, _ in self.tried].count(size) == 1
        slower = self.factor ** max(0, size - self.cliff + 1) if first or not self.lucky else 1.0
        return [replace(trial, seconds=trial.seconds * slower)]


@pytest.mark.parametrize("cliff", [90, 89, 87])
def test_no_size_is_answered_at_which_the_limit_stalls_the_step(cliff):
    machine = Stalling(cliff=cliff)
    search = session(machine)
    answer = search.largest().size
    assert answer == 90
    assert search.before_cliff(answer) == cliff - 1
    assert sum("(measured twice)" in note for note in search.notes) == 91 - cliff
    assert len(machine.tried) <= 4 + 3 * (91 - cliff)


def test_a_size_that_was_slow_once_is_not_slow():
    search = session(Stalling(cliff=90, lucky=True))
    assert search.before_cliff(search.largest().size) == 90
    assert search.notes == []


@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_where_the_last_row_costs_little_nothing_more_is_tried(factor):
    machine = Stalling(cliff=90, factor=factor)
    search = session(machine)
    answer, tried = search.largest().size, len(machine.tried)
    assert search.before_cliff(answer) == 90
    assert len(machine.tried) <= tried + 1
    search = session(Machine(free=0.9))
    assert search.before_cliff(search.largest().size) == 90  # which ran free
