"""One search from its first look at the graph to its answer: what is tried, in which order, and what is kept of it."""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mlx_tune.batching.journal import Runner
from mlx_tune.batching.result import Trial
from mlx_tune.batching.search import Found, SizeMeasurement, search
from mlx_tune.errors import TraceError, TrialError
from mlx_tune.measuring.floors import Floor
from mlx_tune.measuring.forecast import Forecast, read_ahead
from mlx_tune.progress import Bar
from mlx_tune.units import format_bytes, format_limit, format_percent, format_seconds

_log = logging.getLogger(__name__)

#: A size predicted to take this share of the budget may be the answer, and gets its real steps at once.
_NEAR = 0.85
#: With an estimate, the first trial goes this far from the smallest size's floor towards the budget, and no further
#: than this share of the size that the estimate says will fit: it is there to learn from, and takes several steps.
_FIRST, _FIRST_SIZE = 0.1, 0.125
#: Of what the next size needs more, the part that may be kept clear for the scatter of single peaks: a third.
_SCATTER_SHARE = 3
#: How many more trials a question about speed may take.
_SPEED_TRIALS = 6
#: Where rows take longer than this, against those of the next size down, the limit stalls the step: no such size is
#: answered.
_CLIFF = 0.1


@dataclass
class Session:
    """One search. Each size's last trial is remembered, so that the answer can be looked at again.

    Attributes:
        runner: Measures a size.
        sizes: Possible answers, ascending.
        budget_bytes: The limit of a peak.
        steps: Real steps that an answer must have been through.
        bar: Told what is being tried.
        trials: Everything that was measured, in order.
        notes: Remarks on what was out of the ordinary.
        margin: The most that a peak may lie above what is expected of its size, as a share of what the step adds.
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
    margin: float = 0.0

    def look_ahead(self, estimate: Callable[[int], Floor], warm: Callable[[int, int], bool]) -> None:
        """Read the step's graph where that is possible, so that fewer sizes have to be tried.

        Args:
            estimate: The floor of a step at a size, from its graph.
            warm: Takes the first step of all at a size, of which it is told the most bytes at its floor, so that the
                optimizer's state is there to be counted, and says whether that made any which the estimate had not
                foreseen.
        """
        self.foresee(lambda: read_ahead(estimate, warm, self.sizes, self.budget_bytes))

    def foresee(self, read: Callable[[], Forecast]) -> None:
        """Take what the step's graph says for the shape of its peaks, and begin where that says it is cheap to learn.

        Args:
            read: Reads the graph; raises `TraceError` where it cannot.

        Raises:
            TrialError: However many rows are asked for, the step needs the same.
        """
        self.bar.update(text="reading the step's graph")
        try:
            forecast = read()
        except TraceError as error:
            self.notes.append(
                f"small trials took the place of an estimate from the step's graph: {str(error).splitlines()[0]}"
            )
            _log.warning("%s", self.notes[-1])
            return
        smallest = self.sizes[0]
        floor = forecast(smallest)
        if floor > self.budget_bytes:
            self._keep([Trial(smallest, round(floor), limit_bytes=self.budget_bytes, reason="predicted, not tried")])
            return
        if forecast.flat:
            same = [f"make_batch({size})" for size in sorted(forecast.knots)[-3:]]
            raise TrialError(
                f"Steps with {same[0]}, {same[1]} and {same[2]} need exactly the same memory: make_batch must return "
                f"as many rows as it is asked for. If the data set holds no more, pass max_batch= how many it holds."
            )
        self.forecast = forecast
        goal = floor + _FIRST * (self.budget_bytes - floor)
        fitting = bisect_right(self.sizes, float(self.budget_bytes), key=forecast) - 1
        small = bisect_right(self.sizes, _FIRST_SIZE * self.sizes[fitting]) - 1
        self.start = max(0, min(small, bisect_right(self.sizes, goal, key=forecast) - 1))

    def largest(self, accept: Callable[[Trial], str | None] | None = None) -> Found:
        """Find the largest size that fits and, having been through all its steps, is accepted.

        Args:
            accept: Says what else is wrong with an answer, or None.
        """
        while True:
            found = search(
                self._measure,
                self.sizes,
                self.budget_bytes,
                shape=self.forecast,
                look=None if self.forecast is None else self.forecast.look,
                start=self.start,
                margin=self.margin,
            )
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
        """The largest size whose rate is at most `slowdown` below that of steps which no limit holds back.

        The largest of those that were tried says what that rate is: sizes near it use the machine alike.
        """
        free = self._largest_free()
        if free is None:
            self.notes.append(
                f"slowdown={slowdown:g} could not be held to: at each size the limit made MLX wait, so there was "
                f"nothing to compare with"
            )
            return answer
        if free.batch_size == answer:
            return answer
        least = self._rate(free.batch_size) / (1 + slowdown)

        def fast(size: int) -> bool:
            return self._rate(size) >= least or self.known[size].ran_free  # which no timing can deny

        size = self._largest_fast(free.batch_size, answer, fast)
        if size < answer:
            self.notes.append(
                f"batch {answer} fits as well, but is slower; the answer is the largest found whose rows take at most "
                f"{format_percent(slowdown)} longer than at batches that never wait"
            )
        return size

    def before_cliff(self, answer: int) -> int:
        """The largest size, up to the one that fits, whose rows take at most a tenth longer than at the next size down.

        The last sizes that fit may do so only with every operation waiting for the one before. That is looked at where
        the answer was held back and a smaller size that was tried is faster by as much, and must show twice.
        """
        size = answer
        while (below := bisect_left(self.sizes, size) - 1) >= 0 and not self.known[size].ran_free:
            smaller = (t for n, t in self.known.items() if n < size and t.fits)
            if not self._stalls(size, max((t.items_per_second or 0.0 for t in smaller), default=0.0)):
                break
            if not self._stalls(size, self._rate(self.sizes[below])):
                break
            again = [self._try(n, round(self._needed(n)), self.steps) for n in (size, self.sizes[below])]
            if not all(trial.fits for trial in again) or not self._stalls(size, again[1].items_per_second or 0.0):
                break
            self.notes.append(
                f"batch {size} fits as well, but its rows take more than {format_percent(_CLIFF)} longer than at "
                f"{self.sizes[below]} under the limit that it needs (measured twice)"
            )
            size = self.sizes[below]
        return size

    def _stalls(self, size: int, rate: float) -> bool:
        return self._rate(size) * (1 + _CLIFF) < rate

    def unhindered(self, answer: int) -> int | None:
        """The largest size that runs without being held back, as far as one that did can tell; None if none did."""
        free = self._largest_free()
        if free is None or free.base_bytes is None or free.peak_bytes is None or free.held_bytes is None:
            return None
        added = max(1, free.held_bytes - free.base_bytes)
        factor, base = (free.peak_bytes - free.base_bytes) / added, free.base_bytes

        def peak(size: int) -> float:
            return base + factor * (self._needed(size) - base)

        last = bisect_right(self.sizes, answer)
        return max(
            free.batch_size,
            self.sizes[max(0, bisect_right(self.sizes, float(self.budget_bytes), hi=last, key=peak) - 1)],
        )

    def _largest_free(self) -> Trial | None:
        free = [trial for trial in self.known.values() if trial.fits and trial.ran_free and trial.items_per_second]
        return max(free, key=lambda trial: trial.batch_size, default=None)

    def _needed(self, size: int) -> float:
        """The needs of a size held back, by those of its neighbours."""
        axis = self.forecast or float
        seen = sorted((n, t.held_bytes) for n, t in self.known.items() if t.held_bytes is not None)
        if len(seen) < 2:
            return seen[0][1] + axis(size) - axis(seen[0][0]) if self.forecast is not None else float(seen[0][1])
        right = min(max(bisect_right(seen, size, key=lambda point: point[0]), 1), len(seen) - 1)
        (a, low), (b, high) = seen[right - 1], seen[right]
        return low + (axis(size) - axis(a)) / max(1e-9, axis(b) - axis(a)) * (high - low)

    def _largest_fast(self, low: int, high: int, fast: Callable[[int], bool]) -> int:
        """The largest size up to `high` that is fast, as `low` is known to be."""
        if fast(high):
            return high
        bottom, top = bisect_right(self.sizes, low) - 1, bisect_right(self.sizes, high) - 1
        for _ in range(_SPEED_TRIALS):
            if top - bottom <= 1:
                break
            middle = (bottom + top) // 2
            bottom, top = (middle, top) if fast(self.sizes[middle]) else (bottom, middle)
        return self.sizes[bottom]

    def _rate(self, size: int) -> float:
        trial = self.known.get(size)
        if trial is None or (trial.fits and trial.steps < self.steps):
            trial = self._try(size, round(self._needed(size)), self.steps)
        return trial.items_per_second or 0.0 if trial.fits else 0.0

    def _measure(self, size: int, predicted: int | None) -> SizeMeasurement:
        trial = self.known.get(size)
        if trial is None:
            if predicted is None and self.forecast is not None:
                predicted = round(self.forecast(size))
            trial = self._try(size, predicted, self.steps if self._may_be_last(size, predicted) else 1)
        if not trial.fits:
            needed = max((n for n in (trial.held_bytes, trial.peak_bytes) if n is not None), default=None)
        elif trial.held_bytes is None or trial.floor_bytes is None:
            needed = trial.held_bytes
        else:
            needed = trial.floor_bytes + self._margin(trial)
        return SizeMeasurement(trial.fits, needed, trial.base_bytes)

    def _margin(self, trial: Trial) -> int:
        """The part of the scatter of single peaks that is kept clear of the budget.

        All of it where the next size needs hardly more than that. Where sizes are further apart, a budget between two
        of them is more likely to lie in the middle than in the scatter of the lower one, whose own steps will tell.
        """
        scatter = (trial.held_bytes or 0) - (trial.floor_bytes or 0)
        growth = self._growth(trial.batch_size)
        return scatter if growth is None or growth < scatter else min(scatter, int(growth / _SCATTER_SHARE))

    def _growth(self, size: int) -> float | None:
        """By how much the next size needs more than this one, according to the graph."""
        position = bisect_right(self.sizes, size)
        if self.forecast is None or position >= len(self.sizes):
            return None
        return self.forecast(self.sizes[position]) - self.forecast(size)

    def _may_be_last(self, size: int, predicted: int | None) -> bool:
        """True where a size may turn out to be the answer, so that all its steps had better be taken at once."""
        if size == self.sizes[-1]:
            return True
        if predicted is None:
            return False
        return predicted + max(self._growth(size) or 0.0, (1 - _NEAR) * self.budget_bytes) > self.budget_bytes

    def _try(self, size: int, predicted: int | None, steps: int) -> Trial:
        foreseen = ""
        if predicted is not None:
            foreseen = f", predicted {format_bytes(predicted)} of {format_bytes(self.budget_bytes)}"
        self.bar.update(text=f"trying batch size {size}{foreseen}")
        trial = self._keep(self.runner.trial(size, predicted, steps))
        self.bar.ended(f"batch size {size}: {_outcome(trial)}")
        return trial

    def _keep(self, trials: list[Trial]) -> Trial:
        self.trials.extend(trials)
        self.known[trials[-1].batch_size] = trials[-1]
        return trials[-1]


def _outcome(trial: Trial) -> str:
    """The outcome of a trial, in a line of the log."""
    if trial.peak_bytes is None:
        return f"does not fit, {trial.reason or 'which its first steps showed'}"
    verdict = "fits" if trial.fits else f"does not fit{', ' + trial.reason if trial.reason else ''}"
    taken = "" if trial.seconds is None else f", {format_seconds(trial.seconds)} a step"
    return f"{verdict}, peak {format_bytes(trial.peak_bytes)} under {format_limit(trial.limit_bytes)}{taken}"
