"""Settings that are run: the limit that holds each within the budget, and how they come in when timed in turns."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from mlx_tune.checkpointing.planning.choose import Choice
from mlx_tune.checkpointing.planning.measure import LEAST_RUNS, ChoiceMeasurement, Measurements, made
from mlx_tune.checkpointing.planning.survey import Survey
from mlx_tune.errors import BudgetError
from mlx_tune.measuring.interleaved_timing import Standing, race
from mlx_tune.measuring.ranks import Ranks
from mlx_tune.measuring.step import StepTrial
from mlx_tune.measuring.step_outcome import is_out_of_memory
from mlx_tune.measuring.throttle import lowered
from mlx_tune.progress import Bar
from mlx_tune.units import format_bytes

#: The time that a step which ran out of memory is said to have taken: longer than any that did not.
OUT_OF_MEMORY_SECONDS = 1e6
#: How often a limit is lowered for a setting whose peak went over the budget after all.
_SECOND_CHANCES = 2


@dataclass(eq=False)
class Candidate:
    """A batch size with a choice of blocks.

    Attributes:
        batch_size: Rows in a step.
        choice: Which blocks are checkpointed, and which loss it has where there are two.
        floor_bytes: The least that the step needs.
        known_as: Why anybody would try it, or nothing.
        measured: The cost of real steps, where it was run.
        foreseen: Rows a second, predicted before it was run.
        standing: Its standing where it was timed in turns with others.
    """

    batch_size: int
    choice: Choice
    floor_bytes: int
    known_as: str = ""
    measured: ChoiceMeasurement | None = None
    foreseen: float | None = None
    standing: Standing | None = None

    @property
    def rows_per_second(self) -> float:
        """ChoiceMeasurement; 0 where it was not run."""
        return self.batch_size / self.measured.seconds if self.measured else 0.0

    @property
    def fits(self) -> bool:
        """True where it was run and its peak is within the budget."""
        return self.measured is not None and self.measured.fits

    @property
    def died(self) -> bool:
        """True where it ran out of memory, so that nothing was measured."""
        return self.measured is not None and self.measured.seconds >= OUT_OF_MEMORY_SECONDS

    @property
    def held_back(self) -> bool:
        """True where it fits, and only because the limit made it wait."""
        return self.fits and self.measured is not None and self.measured.peak_bytes >= self.measured.limit_bytes

    @property
    def peak_bytes(self) -> int:
        """ChoiceMeasurement; 0 where it was not run."""
        return self.measured.peak_bytes if self.measured else 0

    @property
    def behind(self) -> float:
        """The extra time of a row over that under the fastest setting; infinite where it was not timed in turns."""
        return self.standing.behind if self.standing else math.inf

    def fall_back(self, by: float) -> None:
        """Note that what it was held against turned out to be this far behind itself."""
        if self.standing is not None:
            self.standing = replace(self.standing, behind=(1 + self.standing.behind) * (1 + by) - 1)


class Trials:
    """Runs settings of one step, and remembers what came of it.

    Args:
        survey: The step.
        budget_bytes: The limit of the peak.
        steps: Real steps for each setting and limit.
        throttle: True where the memory limit may be below the budget.
        tolerance: Differences in rate up to this share do not count.
        ranks: The processes that search.
        recover: Puts back what a step changes; called after one that ran out of memory in the middle.
        bar: Told what is going on.
    """

    def __init__(
        self,
        survey: Survey,
        budget_bytes: int,
        *,
        steps: int,
        throttle: bool,
        tolerance: float,
        ranks: Ranks,
        recover: Callable[[], None],
        bar: Bar,
    ) -> None:
        """Note what to run; nothing is run yet."""
        self.survey, self.budget, self.steps, self.throttle = survey, budget_bytes, steps, throttle
        self.tolerance, self.ranks, self.recover, self.bar = tolerance, ranks, recover, bar
        self._real: dict[int, Measurements] = {}

    def measure(self, candidate: Candidate) -> None:
        """Run a setting under the best limit for it."""
        self._take_batch(candidate.batch_size)
        candidate.measured = self._real[candidate.batch_size].fit(candidate.choice, candidate.floor_bytes)

    def weigh(self, size: int, first: Choice, second: Choice, threshold: float) -> tuple[float, float]:
        """Time two choices at one batch size, as `Measurements.weigh` does."""
        self._take_batch(size)
        try:
            return self._real[size].weigh(first, second, threshold)
        finally:
            self._real.clear()  # the ways to run the step may be fewer now

    def in_turns(self, racers: Sequence[Candidate], most_turns: int) -> list[Candidate]:
        """Time settings in turns, note how they came in, and return those that fit, the fastest first."""
        ways = [partial(self._one_turn, candidate) for candidate in racers]
        standings = race(ways, tolerance=self.tolerance, most_turns=most_turns)
        for candidate, standing in zip(racers, standings, strict=True):
            candidate.standing = standing
        finished = [c for c in racers if math.isfinite(c.behind) and c.fits]
        if not finished:
            raise self.nothing_fits(min(racers, key=lambda c: c.peak_bytes))
        return sorted(finished, key=lambda c: c.behind)

    def steady(self, candidate: Candidate) -> bool:
        """See that a setting stays within the budget in enough steps since one that did not, under some limit."""
        measured = candidate.measured
        assert measured is not None
        if measured.fits and measured.runs < LEAST_RUNS:
            self._take_batch(candidate.batch_size)
            self._real[candidate.batch_size].hold(measured)
        return measured.fits

    def _one_turn(self, candidate: Candidate) -> float:
        """One more step of a setting; seconds for each row, infinite where no limit holds it within the budget."""
        measured = candidate.measured
        assert measured is not None
        self.bar.update(text=f"batch {candidate.batch_size}, {self.survey.ways.named(candidate.choice)}, in turns")
        for chances in reversed(range(1 + _SECOND_CHANCES)):
            self._take_batch(candidate.batch_size)
            seconds = self._real[candidate.batch_size].once(measured)
            if measured.fits:
                return max(1e-9, seconds) / candidate.batch_size
            lower = lowered(measured.limit_bytes, measured.peak_bytes, self.budget)
            if not (chances and self.throttle) or lower < 0.7 * candidate.floor_bytes:
                break
            measured.limit_bytes, measured.peak_bytes, measured.seconds = lower, 0, math.inf
        return math.inf

    def _take_batch(self, size: int) -> None:
        """Make the batch that is about to be run, and let go of others: they would count towards its peak."""
        survey = self.survey
        if size not in self._real:
            self._real[size] = Measurements(
                survey.ways,
                None,
                survey.state,
                self.budget,
                self.steps,
                self.bar,
                throttle=self.throttle,
                share=self._on_all_ranks,
            )
        if self._real[size].batch is None:
            for other in self._real.values():
                other.batch = None
            self._real[size].batch = self.ranks.agree(lambda: made(survey.make_batch, size))

    def _on_all_ranks(self, run: Callable[[], StepTrial]) -> StepTrial:
        """A step of all ranks; one that runs out of memory on any of them has a peak of twice the budget."""
        try:
            return self.ranks.step(run)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the arrays that did not fit
        self.recover()  # the model waits for what the step was to compute
        gc.collect()
        mx.clear_cache()
        return StepTrial(None, 2 * self.budget, OUT_OF_MEMORY_SECONDS)

    def nothing_fits(self, least: Candidate) -> BudgetError:
        """The estimate said that it fits, and the measurement that it does not."""
        ways = self.survey.ways
        outcome = f"peaked at {format_bytes(least.peak_bytes)}. Take a budget a few per cent larger."
        if least.died:
            outcome = "ran out of memory. Shorten the rows: the machine has less free than the budget allows."
        blocks = f"with {ways.named(least.choice)} " if ways.paths else ""
        return BudgetError(
            f"Batch size {least.batch_size} does not fit {format_bytes(self.budget)}: {blocks}it was predicted to need "
            f"at least {format_bytes(least.floor_bytes)}, and it {outcome}",
            needed_bytes=None if least.died else least.peak_bytes,
            budget_bytes=self.budget,
        )
