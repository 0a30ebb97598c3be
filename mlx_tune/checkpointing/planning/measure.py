"""Real steps under a choice: the limit that holds it within the budget, and which of two is faster."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_tune.checkpointing.planning.choose import Choice
from mlx_tune.checkpointing.planning.ways import Ways
from mlx_tune.interrupts import interruptible
from mlx_tune.measuring.interleaved_timing import Comparison, compare
from mlx_tune.measuring.step import StepTrial, run_step
from mlx_tune.measuring.throttle import OVERSHOOT, best_trial, limit_trials, lowered
from mlx_tune.memory import cache_room, held_cache
from mlx_tune.progress import Bar
from mlx_tune.trees import arrays_of
from mlx_tune.units import format_bytes, format_seconds

#: A choice whose fastest step took this much longer than another's is not timed against it once more.
HOPELESS = 1.15
#: Steps that stayed within the budget since one that did not, before a choice is answered.
LEAST_RUNS = 2


@dataclass
class ChoiceMeasurement:
    """The knowledge of one choice from real steps.

    Attributes:
        choice: The choice.
        limit_bytes: The highest limit tried that kept its peak within the budget, or else the last one tried.
        peak_bytes: The highest peak under that limit.
        seconds: The fastest step under that limit.
        fits: True where the peak is within the budget.
        runs: The number of steps that limit was tried with since a peak last left the budget, under any.
    """

    choice: Choice
    limit_bytes: int
    peak_bytes: int
    seconds: float
    fits: bool
    runs: int = 0


class Measurements:
    """Runs a step under choices of blocks, and remembers what came of it."""

    def __init__(
        self,
        ways: Ways,
        batch: object,
        state: object,
        budget_bytes: int,
        steps: int,
        bar: Bar,
        *,
        throttle: bool = True,
        share: Callable[[Callable[[], StepTrial]], StepTrial] = lambda run: run(),
    ) -> None:
        """Note what to run; nothing is run yet.

        Without `throttle` the only limit tried is the budget itself. Every step is run through `share`: where several
        machines measure together, it hands all of them the same figures, so that they come to the same choice.
        """
        self.ways, self.batch, self.state = ways, batch, state
        self.budget_bytes, self.steps, self.bar = budget_bytes, steps, bar
        self.throttle, self.share = throttle, share
        self.made: dict[Choice, ChoiceMeasurement] = {}

    def fit(self, choice: Choice, floor_bytes: int) -> ChoiceMeasurement:
        """Find the highest limit under which a choice stays within the budget.

        Args:
            choice: The choice.
            floor_bytes: Its estimated floor.

        Returns:
            The measurement; from an earlier call where there was one.
        """
        if choice in self.made:
            return self.made[choice]
        latest: StepTrial | None = None

        def run(limit: int) -> StepTrial:
            nonlocal latest
            self.bar.update(text=f"{self.ways.named(choice)} under {format_bytes(limit)}")
            if latest is None:  # the first step traces and compiles
                latest = replace(self._run(step, limit), limit_bytes=limit)
            peak = latest.peak_bytes + max(0, limit - (latest.limit_bytes or 0))
            trials: list[StepTrial] = []
            for _ in range(self.steps):
                trials.append(self._run(step, limit, max((t.peak_bytes for t in trials), default=peak)))
            latest = StepTrial(limit, max(t.peak_bytes for t in trials), min(t.seconds for t in trials))
            return latest

        with self.ways.applied(choice) as step:
            lowest = floor_bytes if self.throttle else self.budget_bytes
            trials = limit_trials(run, lowest, self.budget_bytes, most=4 if self.throttle else 1)
        best = best_trial(trials, self.budget_bytes)
        shown = best or min(trials, key=lambda t: t.peak_bytes)
        since = trials[trials.index(shown) :]
        runs = self.steps if all(t.peak_bytes <= self.budget_bytes for t in since) else 0
        self.made[choice] = ChoiceMeasurement(
            choice, shown.limit_bytes or self.budget_bytes, shown.peak_bytes, shown.seconds, best is not None, runs
        )
        self.bar.ended(
            f"{self.ways.named(choice)}: {'fits' if best else 'does not fit'}, peak "
            f"{format_bytes(shown.peak_bytes)}, {format_seconds(shown.seconds)} a step"
        )
        return self.made[choice]

    def faster(self, favourite: ChoiceMeasurement, other: ChoiceMeasurement) -> ChoiceMeasurement:
        """Time two choices in turns.

        Args:
            favourite: Wins unless the other is clearly faster.
            other: A choice that was expected to be slower.

        Returns:
            The winner.
        """
        if other.seconds > HOPELESS * favourite.seconds:
            return favourite
        self.bar.update(text=f"{self.ways.named(favourite.choice)} against {self.ways.named(other.choice)}")
        seen = self._compared(favourite, other, 1.0)
        return other if other.fits and seen.ratio * (1 + 2 * seen.uncertainty) < 1 else favourite

    def weigh(self, first: Choice, second: Choice, threshold: float) -> tuple[float, float]:
        """Time two choices in turns that both fit with room to spare, under one limit.

        Args:
            first: A choice.
            second: Another.
            threshold: The ratio of the second one's time to the first one's that is in question.

        Returns:
            That ratio, the median over the turns, and the seconds of the first one's fastest step.
        """
        limit = int(self.budget_bytes / (1 + OVERSHOOT)) if self.throttle else self.budget_bytes
        one, other = (ChoiceMeasurement(choice, limit, 0, math.inf, True) for choice in (first, second))
        for measured in (one, other):
            self.bar.update(text=f"{self.ways.named(measured.choice)}, in turns")
            self.once(measured)  # traces and compiles
            measured.seconds = math.inf
        return self._compared(one, other, threshold).ratio, one.seconds

    def _compared(self, first: ChoiceMeasurement, second: ChoiceMeasurement, threshold: float) -> Comparison:
        most = max(3, 3 * self.steps)
        return compare(lambda: self.once(first), lambda: self.once(second), threshold=threshold, most_turns=most)

    def hold(self, measured: ChoiceMeasurement) -> ChoiceMeasurement:
        """Run a choice some more, and lower its limit where its peak leaves the budget: peaks differ from step to step.

        One step within the budget, after one that was not, may be a low one: at least two decide.

        Args:
            measured: A choice that was run.

        Returns:
            The same; it fits if its peak stayed within the budget under the limit that it has now.
        """
        with self.ways.applied(measured.choice) as step:
            self._again(step, measured, measured.limit_bytes)
            for _ in range(4 if self.throttle else 0):
                if measured.fits:
                    break
                least = measured.limit_bytes // 50
                limit = lowered(measured.limit_bytes, measured.peak_bytes, self.budget_bytes, least=least)
                measured.peak_bytes, measured.seconds = 0, math.inf
                self._again(step, measured, limit)
        return measured

    def _again(self, step: Callable[..., object], measured: ChoiceMeasurement, limit: int) -> None:
        self.bar.update(text=f"{self.ways.named(measured.choice)} under {format_bytes(limit)}")
        measured.limit_bytes = limit
        for _ in range(max(self.steps, LEAST_RUNS)):
            self._count(measured, self._run(step, limit, measured.peak_bytes))

    def _count(self, measured: ChoiceMeasurement, trial: StepTrial) -> None:
        """Take one more step of a choice into its figures."""
        measured.seconds = min(measured.seconds, trial.seconds)
        measured.peak_bytes = max(measured.peak_bytes, trial.peak_bytes)
        measured.fits = measured.peak_bytes <= self.budget_bytes
        measured.runs = measured.runs + 1 if measured.fits else 0

    def once(self, measured: ChoiceMeasurement) -> float:
        """One more step of a choice under its limit; returns its seconds."""
        with self.ways.applied(measured.choice) as step:
            trial = self._run(step, measured.limit_bytes, measured.peak_bytes)
        self._count(measured, trial)
        return trial.seconds

    def _run(self, step: Callable[..., object], limit_bytes: int, peak_bytes: int = 0) -> StepTrial:
        """One step; cached buffers get what the peak so far leaves of the budget, which is nothing at first."""
        with held_cache(cache_room(self.budget_bytes, peak_bytes or self.budget_bytes)):
            return self.share(lambda: run_step(step, (self.batch,), self.state, limit_bytes))


def made(make_batch: Callable[[int], object], size: int) -> object:
    """A batch that exists."""
    with interruptible():
        batch = make_batch(size)
        mx.eval(list(arrays_of(batch)))
    return batch
