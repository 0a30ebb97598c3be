"""One search from its first look at the graph to its answer: what is tried, in which order, and what is kept of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mlx_tune.batching.forecast import Forecast
from mlx_tune.batching.journal import Runner
from mlx_tune.batching.result import Trial
from mlx_tune.batching.search import Found, Measured, search
from mlx_tune.errors import TraceError
from mlx_tune.progress import Bar
from mlx_tune.units import format_bytes, format_percent

#: A size predicted to take this share of the budget may be the answer, and gets its real steps at once.
_NEAR = 0.85
#: With an estimate, the first trial goes this far from the smallest size's floor towards the budget.
_FIRST = 0.1
#: An estimate this far above the budget rules the smallest size out without a trial.
_CERTAIN = 1.1
#: `prefer="fastest"` takes the smallest batch whose rate is within this of the best.
_AS_FAST = 0.02
#: How many more trials a question about speed may take.
_SPEED_TRIALS = 6


@dataclass
class Session:
    """One search. Each size's last trial is remembered, so that the answer can be looked at again.

    Attributes:
        runner: Measures a size.
        sizes: What may be answered, ascending.
        budget_bytes: What a peak must not exceed.
        steps: Real steps that an answer must have been through.
        bar: Told what is being tried.
        trials: Everything that was measured, in order.
        notes: What was out of the ordinary.
    """

    runner: Runner
    sizes: Sequence[int]
    budget_bytes: int
    steps: int
    bar: Bar
    known: dict[int, Trial] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forecast: Forecast | None = None
    start: int = 0

    def look_ahead(self, estimate: Callable[[int], int], warm: Callable[[int], None]) -> None:
        """Read the step's graph where that is possible, so that fewer sizes have to be tried.

        Args:
            estimate: The floor of a step at a size, from its graph.
            warm: Takes the first step of all at a size, so that the optimizer's state is there to be counted.
        """
        self.bar.update(text="reading the step's graph")
        smallest = self.sizes[0]
        try:
            floor = estimate(smallest)
            if floor > _CERTAIN * self.budget_bytes:
                self._keep([Trial(smallest, floor, limit_bytes=self.budget_bytes, reason="predicted, not tried")])
                return
            warm(smallest)
            self.forecast = Forecast(estimate, self.sizes, self.budget_bytes)
        except TraceError as error:
            self.notes.append(f"two small trials took the place of an estimate: {str(error).splitlines()[0]}")
            return
        goal = floor + _FIRST * (self.budget_bytes - floor)
        self.start = max(0, bisect_right(self.sizes, goal, key=self.forecast) - 1)

    def largest(self, accept: Callable[[Trial], str | None] | None = None) -> Found:
        """Find the largest size that fits and, having been through all its steps, is accepted.

        Args:
            accept: Says what else is wrong with an answer, or None.
        """
        while True:
            found = search(self._measure, self.sizes, self.budget_bytes, shape=self.forecast, start=self.start)
            if found.size is None:
                return found
            trial = self.known[found.size]
            if trial.steps < self.steps:
                trial = self._try(found.size, trial.held_bytes, self.steps)
            if not trial.fits:
                continue
            wrong = accept(trial) if accept is not None else None
            if wrong is None:
                return found
            self._keep([replace(trial, fits=False, reason=wrong)])

    def within_slowdown(self, answer: int, slowdown: float) -> int:
        """The largest size whose steps take no more than `slowdown` longer than unhindered ones would."""
        free = [trial for trial in self.trials if trial.fits and trial.ran_free and trial.items_per_second]
        if not free:
            self.notes.append("slowdown: no size ran unhindered within the budget, so there is nothing to compare with")
            return answer
        best = max(trial.items_per_second or 0.0 for trial in free)
        size = self._bisect_rate(free[-1].batch_size, answer, best / (1 + slowdown))
        if size < answer:
            self.notes.append(
                f"largest batch at any speed: {answer}; the answer is the largest within "
                f"{format_percent(slowdown)} of the unhindered rate"
            )
        return size

    def fastest(self, answer: int) -> int:
        """The smallest size whose rate is within 2 % of the best."""
        position = bisect_right(self.sizes, answer) - 1
        best = self._rate(answer)
        slow, fast, left = -1, position, _SPEED_TRIALS
        while left > 0 and fast - slow > 1:
            middle = (slow + fast) // 2
            rate, left = self._rate(self.sizes[middle]), left - 1
            best = max(best, rate)
            if rate >= (1 - _AS_FAST) * best:
                fast = middle
            else:
                slow = middle
        rates = {n: t.items_per_second or 0.0 for n, t in self.known.items() if t.fits and t.steps >= self.steps}
        size = min(n for n, rate in rates.items() if rate >= (1 - _AS_FAST) * max(rates.values()))
        if size < answer:
            self.notes.append(f"largest batch that fits: {answer}; the answer is the smallest that is as fast")
        return size

    def _bisect_rate(self, low: int, high: int, least: float) -> int:
        """The largest size up to `high` with at least a rate, `low` being known to have it."""
        if low >= high or self._rate(high) >= least:
            return high
        bottom, top = bisect_right(self.sizes, low) - 1, bisect_right(self.sizes, high) - 1
        for _ in range(_SPEED_TRIALS):
            if top - bottom <= 1:
                break
            middle = (bottom + top) // 2
            bottom, top = (middle, top) if self._rate(self.sizes[middle]) >= least else (bottom, middle)
        if self.known[self.sizes[bottom]].steps < self.steps:
            self._try(self.sizes[bottom], self.known[self.sizes[bottom]].held_bytes, self.steps)
        return self.sizes[bottom]

    def _rate(self, size: int) -> float:
        trial = self.known.get(size)
        if trial is None or (trial.fits and trial.steps < self.steps):
            trial = self._try(size, None if self.forecast is None else round(self.forecast(size)), self.steps)
        return trial.items_per_second or 0.0 if trial.fits else 0.0

    def _measure(self, size: int, predicted: int | None) -> Measured:
        trial = self.known.get(size)
        if trial is None:
            if predicted is None and self.forecast is not None:
                predicted = round(self.forecast(size))
            near = size == self.sizes[-1] or (predicted is not None and predicted >= _NEAR * self.budget_bytes)
            trial = self._try(size, predicted, self.steps if near else 1)
        return Measured(trial.fits, trial.held_bytes)

    def _try(self, size: int, predicted: int | None, steps: int) -> Trial:
        foreseen = ""
        if predicted is not None:
            foreseen = f", predicted {format_bytes(predicted)} of {format_bytes(self.budget_bytes)}"
        self.bar.update(text=f"trying batch size {size}{foreseen}")
        return self._keep(self.runner.trial(size, predicted, steps))

    def _keep(self, trials: list[Trial]) -> Trial:
        self.trials.extend(trials)
        self.known[trials[-1].batch_size] = trials[-1]
        return trials[-1]
