"""`autofit`: checkpoints, batch size, accumulation and memory limit chosen together, for the most tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import mlx.core as mx
import mlx.nn as nn

from mlx_tune import devices
from mlx_tune.batching.probe import count_items
from mlx_tune.batching.ranks import Ranks
from mlx_tune.checkpointing.blocks import Select
from mlx_tune.checkpointing.choose import ESTIMATE_MARGIN, OVERSHOOT, Choice, cheapest_fitting, relaxed
from mlx_tune.checkpointing.measure import Measured, Measurements
from mlx_tune.checkpointing.plan import does_not_fit
from mlx_tune.checkpointing.survey import Survey
from mlx_tune.errors import BudgetError, InvalidArgumentError
from mlx_tune.fitting.predict import Pace, largest_fitting, pace_through, thinned, unbeaten
from mlx_tune.fitting.result import Fit, Setting
from mlx_tune.fitting.together import Together
from mlx_tune.memory import resolve_budget
from mlx_tune.progress import Bar, progress_bar
from mlx_tune.state import Snapshot
from mlx_tune.timing import arrays_of, compare
from mlx_tune.units import format_bytes

#: Where neither a target nor a maximum is given, sizes end here.
_NO_MAXIMUM = 1 << 32
#: How many sizes without any checkpointing, and how many with some, are looked at.
_PLAIN_SIZES, _LARGER_SIZES = 5, 4
#: mlx-lm's default, looked at where it fits: nobody should be slower than without this library.
_USUAL_BATCH = 4
#: Rates this close to the best measured one are timed against it in turns.
_CLOSE = 0.9


def autofit(
    model: nn.Module,
    step: Callable[[Any], Any],
    make_batch: Callable[[int], Any],
    *,
    budget: str | SupportsIndex | float | None = None,
    target_batch: int | None = None,
    tolerance: float = 0.02,
    state: Any = (),
    max_batch: int | None = None,
    multiple_of: int = 1,
    select: Select | None = None,
    throttle: bool | None = None,
    steps: int = 2,
    group: Any = None,
    progress: bool = True,
) -> Fit:
    """Choose checkpoints, batch size, accumulation and memory limit together, for the most tokens a second.

    They hang together: checkpointing frees memory for a larger batch, which may or may not be faster. What a batch
    and a choice of blocks need is read from the step's graph; what a step takes is predicted from measured ones and
    the blocks' forward passes. Batches that are run begin small and grow for as long as larger ones promise a higher
    rate; then the settings that promise most are run, and those that come out close are timed in turns.

    Args:
        model: The model, in training mode, with no block checkpointed.
        step: `step(batch)` runs one training step and returns arrays, the loss first.
        make_batch: `make_batch(n)` returns the longest batch of n.
        budget: What the peak may be: bytes, text such as "24GB", a share of this machine's budget, or None for
            `memory_budget()`.
        target_batch: Rows that make up one update: batch sizes divide it, and `accumulation_steps` says how many
            steps make it up. None for whatever is fastest.
        tolerance: Of the settings within this share of the best rate, the one with the lowest peak is chosen.
        state: What the step changes besides the model: the optimizer.
        max_batch: The largest batch to consider, such as the size of the data set.
        multiple_of: Batch sizes divide by this, such as the number of machines that share a batch.
        select: Which blocks may be checkpointed, as for `checkpoint_blocks`.
        throttle: Whether the memory limit may be set below the budget, which makes MLX wait instead of running
            ahead. By default yes, except on Metal, where nobody has measured it yet; there the limit is the budget.
        steps: How many real steps are timed for each setting and limit; the fastest counts.
        group: The `mx.distributed` group to agree with; by default that of `mlx.launch`, where it is at work. Every
            rank gets the same answer, for the smallest budget and the slowest machine.
        progress: Show a progress line on standard error.

    Returns:
        The fit. Train in `with fit.applied():` with batches of `fit.batch_size`.

    Raises:
        BudgetError: Not even the smallest batch fits with every block checkpointed.
        CheckpointError: A block is checkpointed already, the model is in evaluation mode, or a block cannot be timed.
        TraceError: The step cannot be traced; the text says why.
        InvalidArgumentError: Arguments that contradict one another.

    Examples:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> import mlx_tune as mt
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
        >>> optimizer = optim.SGD(0.1)
        >>> def step(x):
        ...     loss, grads = nn.value_and_grad(model, lambda model, x: model(x).square().mean())(model, x)
        ...     optimizer.update(model, grads)
        ...     return loss
        >>> fit = mt.autofit(model, step, lambda n: mx.ones((n, 64)), budget="1GB", target_batch=8,
        ...                  state=optimizer, progress=False)
        >>> fit.batch_size * fit.accumulation_steps
        8
    """
    sizes = _sizes(max_batch, multiple_of, target_batch)
    if not 0 <= tolerance < 1:
        raise InvalidArgumentError(f"tolerance={tolerance!r}: give a share from 0 up to below 1, such as 0.02.")
    if steps < 1:
        raise InvalidArgumentError(f"steps={steps!r}: give a whole number of at least 1.")
    ranks = Ranks(group)
    allowed = ranks.smallest(ranks.agree(lambda: int(resolve_budget(budget))))
    may_throttle = devices.backend() != "metal" if throttle is None else throttle
    whole = (model, state)
    with Snapshot(whole, spill=True), progress_bar("autofit", enabled=progress) as bar:
        together = Together(ranks)
        survey = Survey(model, step, make_batch, sizes[0], whole, select, bar, together.largest)
        search = _Search(survey, sizes, allowed, steps, may_throttle, together, bar)
        best = search.run()
        return search.result(best, target_batch, tolerance)


def _sizes(max_batch: int | None, multiple_of: int, target_batch: int | None) -> Sequence[int]:
    """Every batch size that may be answered, ascending."""
    for name, value in (("max_batch", max_batch), ("multiple_of", multiple_of), ("target_batch", target_batch)):
        if value is not None and value < 1:
            raise InvalidArgumentError(f"{name}={value!r}: give a whole number of at least 1.")
    last = _NO_MAXIMUM if max_batch is None else max_batch
    sizes: Sequence[int] = range(multiple_of, last + 1, multiple_of)
    if target_batch is not None:
        top = min(last, target_batch)
        sizes = [n for n in range(multiple_of, top + 1, multiple_of) if target_batch % n == 0]
    if not sizes:
        raise InvalidArgumentError(
            f"No batch size divides target_batch={target_batch} and is a multiple of {multiple_of} up to {last}."
        )
    return sizes


@dataclass
class _Candidate:
    """A batch size with a choice of blocks."""

    batch_size: int
    choice: Choice
    floor_bytes: int
    measured: Measured | None = None
    foreseen: float | None = None  # the rate in rows that was predicted before it was run

    @property
    def rows_per_second(self) -> float:
        """Measured; 0 where it was not run."""
        return self.batch_size / self.measured.seconds if self.measured else 0.0


class _Search:
    """One search: what may be run, and what was."""

    def __init__(
        self,
        survey: Survey,
        sizes: Sequence[int],
        budget_bytes: int,
        steps: int,
        throttle: bool,
        together: Together,
        bar: Bar,
    ) -> None:
        self.survey, self.sizes, self.budget, self.steps, self.bar = survey, sizes, budget_bytes, steps, bar
        self.throttle, self.together = throttle, together
        # Without throttling nothing brings a peak down that dispatch has run up, so floors need more room.
        self.goal = int(budget_bytes / (1 + (ESTIMATE_MARGIN if throttle else OVERSHOOT)))
        self.candidates: list[_Candidate] = []
        self.real: dict[int, Measurements] = {}
        self.pace = Pace(0.0, 1.0)
        self.unit, self.items_per_row = "rows", 1.0

    def run(self) -> _Candidate:
        """Predict, measure what promises most, and return the fastest."""
        survey = self.survey
        if survey.floor(survey.all) > self.budget:
            raise does_not_fit(survey, self.budget)
        self.bar.update(text="largest batch with every block checkpointed")
        largest = self.largest(survey.all) or self.sizes[0]
        studied = thinned(self.sizes, self.sizes[0], max(self.sizes[0], largest // 4), 1)[-1]
        survey.batch_size = studied
        survey.study()
        items, self.unit = count_items(survey.make_batch(studied), studied)
        self.items_per_row = items / studied
        self.bar.update(text="largest batch with no block checkpointed")
        plain = self.largest(survey.none)
        self.collect(plain, largest)
        self.learn_pace()
        for candidate in self.worth_running():
            self.measure(candidate)
        return self.best()

    def largest(self, choice: Choice) -> int | None:
        """The largest batch whose floor under a choice leaves the margin."""
        return largest_fitting(self.sizes, lambda n: self.survey.floor(choice, n), self.goal)

    def collect(self, plain: int | None, largest: int) -> None:
        """The settings to predict: sizes without checkpointing, and larger ones with just as much as they need."""
        survey = self.survey
        if plain is not None:
            for n in thinned(self.sizes, max(1, plain // 64), plain, _PLAIN_SIZES):
                self.add(n, survey.none)
            if plain > _USUAL_BATCH and _USUAL_BATCH in self.sizes:
                self.add(_USUAL_BATCH, survey.none)
        for n in thinned(self.sizes, (plain or 0) + 1, largest, _LARGER_SIZES):
            self.bar.update(text=f"estimating batch {n}")

            def floor(choice: Choice, n: int = n) -> int:
                return survey.floor(choice, n)

            # Half of what a limit commonly overshoots is left, so that it need not throttle hard.
            limit = int(self.budget / (1 + OVERSHOOT / 2))
            index = cheapest_fitting(survey.choices, floor, limit)
            if index is not None:
                self.add(n, relaxed(survey.choices[index], survey.kinds, survey.extra_seconds, floor, limit))
        self.add(largest, survey.all)

    def add(self, batch_size: int, choice: Choice) -> None:
        """Note a setting, once."""
        if not any((c.batch_size, c.choice) == (batch_size, choice) for c in self.candidates):
            self.candidates.append(_Candidate(batch_size, choice, self.survey.floor(choice, batch_size)))

    def learn_pace(self) -> None:
        """Run what computes least twice at rising sizes, for as long as larger ones promise more.

        Small steps are cheap and say how time grows with the batch; where the rate no longer grows, a step that fills
        the budget would only take long.
        """
        least = min(sum(c.choice) for c in self.candidates)
        alike = sorted((c for c in self.candidates if sum(c.choice) == least), key=lambda c: c.batch_size)
        points: list[tuple[int, float]] = []
        for candidate in alike:
            if len(points) > 1 and not self.promising(candidate):
                continue
            self.measure(candidate)
            if candidate.measured is not None:
                seconds = candidate.measured.seconds - self.extra(candidate)
                points.append((candidate.batch_size, max(1e-9, seconds)))
                self.pace = pace_through(points[-2:])

    def promising(self, candidate: _Candidate) -> bool:
        """Whether a setting is predicted to be faster than what was run."""
        return self.predicted(candidate) > max((c.rows_per_second for c in self.candidates), default=0.0)

    def extra(self, candidate: _Candidate) -> float:
        """Seconds that a setting computes twice."""
        return self.survey.extra(candidate.choice) * candidate.batch_size / self.survey.batch_size

    def predicted(self, candidate: _Candidate) -> float:
        """Rows a second, from the pace."""
        return candidate.batch_size / (self.pace.seconds(candidate.batch_size) + self.extra(candidate))

    def worth_running(self) -> list[_Candidate]:
        """Of the settings that were not run, the three that promise most, if they promise more than those that were."""
        for candidate in self.candidates:
            candidate.foreseen = candidate.foreseen or self.predicted(candidate)
        waiting = [c for c in self.candidates if c.measured is None and self.promising(c)]
        return sorted(waiting, key=self.predicted, reverse=True)[:3]

    def measure(self, candidate: _Candidate) -> None:
        """Run a setting under the best limit for it."""
        if sum(c.measured is not None for c in self.candidates) > 1:
            candidate.foreseen = self.predicted(candidate)
        n = candidate.batch_size
        if n not in self.real:
            batch = self.survey.make_batch(n)
            mx.eval(list(arrays_of(batch)))
            self.real[n] = Measurements(
                self.survey.model,
                self.survey.paths,
                self.survey.step,
                batch,
                self.survey.state,
                self.budget,
                self.steps,
                self.bar,
                throttle=self.throttle,
                share=self.together.trial,
            )
        candidate.measured = self.real[n].fit(candidate.choice, candidate.floor_bytes)

    def best(self) -> _Candidate:
        """The fastest setting that fits; close ones are timed in turns."""
        fitting = [c for c in self.candidates if c.measured is not None and c.measured.fits]
        if not fitting:
            smallest = min(self.candidates, key=lambda c: (c.batch_size, -sum(c.choice)))
            smallest = _Candidate(self.sizes[0], self.survey.all, self.survey.floor(self.survey.all, self.sizes[0]))
            self.candidates.append(smallest)
            self.measure(smallest)
            if smallest.measured is None or not smallest.measured.fits:
                raise self.nothing_fits(smallest)
            fitting = [smallest]
        top = max(c.rows_per_second for c in fitting)
        favourite, *others = sorted(
            (c for c in fitting if c.rows_per_second >= _CLOSE * top), key=lambda c: c.rows_per_second, reverse=True
        )
        for other in others[:2]:
            favourite = self.duel(favourite, other)
        return favourite

    def duel(self, first: _Candidate, second: _Candidate) -> _Candidate:
        """The faster of two settings, timed in turns; the first where that is not clear."""
        one, two = first.measured, second.measured
        assert one is not None
        assert two is not None
        self.bar.update(text=f"batch {first.batch_size} against {second.batch_size}")
        seen = compare(
            lambda: self.real[first.batch_size].once(one) / first.batch_size,
            lambda: self.real[second.batch_size].once(two) / second.batch_size,
            threshold=1.0,
            most_turns=max(3, 3 * self.steps),
        )
        return second if two.fits and seen.ratio * (1 + 2 * seen.uncertainty) < 1 else first

    def nothing_fits(self, smallest: _Candidate) -> BudgetError:
        """The estimate said that the smallest batch fits, and the measurement that it does not."""
        assert smallest.measured is not None
        return BudgetError(
            f"Batch size {smallest.batch_size} does not fit {format_bytes(self.budget)}: with every block checkpointed "
            f"it was predicted to need at least {format_bytes(smallest.floor_bytes)}, and its peak was "
            f"{format_bytes(smallest.measured.peak_bytes)}. Take a budget a few per cent larger.",
            needed_bytes=smallest.measured.peak_bytes,
            budget_bytes=self.budget,
        )

    def result(self, best: _Candidate, target_batch: int | None, tolerance: float) -> Fit:
        """Settle for the lowest peak within the tolerance, and put it all together."""
        least = (1 - tolerance) * best.rows_per_second
        close = [c for c in self.candidates if c.measured and c.measured.fits and c.rows_per_second >= least]
        chosen = min([best, *close], key=lambda c: c.measured.peak_bytes if c.measured else 0)
        measured = chosen.measured
        assert measured is not None
        per_row = self.items_per_row
        ordered = sorted(self.candidates, key=lambda c: (c.floor_bytes, c.batch_size))
        keep = set(unbeaten([(c.floor_bytes, self.predicted(c)) for c in ordered]))
        settings = [replace(self.setting(c), unbeaten=i in keep) for i, c in enumerate(ordered)]
        notes = []
        if not self.throttle:
            notes.append("The memory limit was not set below the budget (throttle=False).")
        return Fit(
            batch_size=chosen.batch_size,
            accumulation_steps=1 if target_batch is None else target_batch // chosen.batch_size,
            paths=self.survey.chosen(chosen.choice),
            found=len(self.survey.paths),
            limit_bytes=measured.limit_bytes,
            budget_bytes=self.budget,
            predicted_peak_bytes=chosen.floor_bytes,
            measured_peak_bytes=measured.peak_bytes,
            predicted_rate=(chosen.foreseen or self.predicted(chosen)) * per_row,
            measured_rate=chosen.rows_per_second * per_row,
            measured_seconds=measured.seconds,
            unit=self.unit,
            settings=tuple(settings),
            notes=tuple(notes),
            _model=self.survey.model,
        )

    def setting(self, candidate: _Candidate) -> Setting:
        """One row of the result."""
        known = Setting(
            candidate.batch_size,
            sum(candidate.choice),
            candidate.floor_bytes,
            (candidate.foreseen or self.predicted(candidate)) * self.items_per_row,
        )
        measured = candidate.measured
        if measured is None:
            return known
        return replace(
            known,
            limit_bytes=measured.limit_bytes,
            peak_bytes=measured.peak_bytes,
            seconds=measured.seconds,
            rate=candidate.rows_per_second * self.items_per_row,
            fits=measured.fits,
        )
