"""The result of a search for a batch size: the answer, the trials behind it, and the limits it holds under."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mlx_tune.measuring.forecast import ESTIMATE_MARGIN
from mlx_tune.memory import held_limits
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import format_batch, format_bytes, format_limit, format_percent, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: An answer that loses more speed than this to its limit comes with the way to one that does not.
_SLOW = 0.05


@dataclass(frozen=True)
class Trial:
    """One batch size that was measured.

    Attributes:
        batch_size: Rows in the batch.
        predicted_bytes: The peak foreseen before the trial; None where nothing was known yet.
        floor_bytes: The smallest peak with dispatch held back, the least that a step of this size needs; None if the
            trial did not get that far.
        held_bytes: The largest peak to reckon with while dispatch is held back.
        base_bytes: The memory of MLX's arrays before the step, the batch included.
        peak_bytes: The largest peak of the real steps under `limit_bytes`; None if the trial did not get that far.
        limit_bytes: The memory limit that those steps ran under.
        cache_limit_bytes: The cache limit that they ran under, or None where it was left alone.
        seconds: The fastest of those steps.
        items: Tokens in the batch, or rows where it holds no tokens.
        steps: The number of real steps that `peak_bytes` and `seconds` come from.
        fits: True where peak and cache stay within the budget under that limit.
        footprint_bytes: The memory that the system charged the process with after the trial.
        swapped_bytes: The growth of the system's swap during the trial.
        first_seconds: The time of the size's first step, which traces it and compiles its kernels; with the first
            trial, that of the step taken beforehand as well.
        repeated_seconds: The time of all its other steps, under whatever limit.
        reason: Why it does not fit, where that is not the peak.
    """

    batch_size: int
    predicted_bytes: int | None
    limit_bytes: int
    peak_bytes: int | None = None
    seconds: float | None = None
    fits: bool = False
    items: int = 0
    floor_bytes: int | None = None
    cache_limit_bytes: int | None = None
    held_bytes: int | None = None
    base_bytes: int | None = None
    steps: int = 0
    footprint_bytes: int | None = None
    swapped_bytes: int = 0
    first_seconds: float = 0.0
    repeated_seconds: float = 0.0
    reason: str | None = None

    @property
    def items_per_second(self) -> float | None:
        """Tokens (or rows) per second."""
        return None if not self.seconds else self.items / self.seconds

    @property
    def ran_free(self) -> bool:
        """True where the memory limit never had to hold the steps back."""
        return self.peak_bytes is not None and self.peak_bytes <= self.limit_bytes

    def to_dict(self) -> dict[str, Json]:
        """Everything, ready for JSON."""
        return asdict(self) | {"items_per_second": self.items_per_second, "ran_free": self.ran_free}


@dataclass(frozen=True)
class AutobatchResult(Tabular):
    """The batch size that was found, and how.

    Attributes:
        batch_size: The answer, in rows per step; with `accumulation_steps` > 1, the micro-batch.
        accumulation_steps: Steps whose gradients make up one update, so that
            `batch_size * accumulation_steps` is the target.
        peak_bytes: The measured peak at the answer.
        limit_bytes: The memory limit under which it was measured: train under it, see `applied`.
        cache_limit_bytes: The cache limit that goes with it, or None where none is needed.
        budget_bytes: The limit that peak and cache stayed within.
        budget_source: Where the budget comes from.
        seconds: One step at the answer.
        items_per_second: Tokens (or rows) per second at the answer.
        unit: "tokens" or "rows".
        trials: Every size that was measured, in order.
        next_size: The next larger size that could have been the answer; None if there is none.
        next_bytes: Its peak.
        next_measured: True if that was measured, False if it is a prediction.
        unhindered_size: The largest batch, up to the answer, that is predicted to run without its limit ever holding
            it back; None if nothing ran so.
        search_seconds: The time of the whole search.
        notes: Remarks on what was out of the ordinary.
    """

    batch_size: int
    accumulation_steps: int
    peak_bytes: int
    limit_bytes: int
    cache_limit_bytes: int | None
    budget_bytes: int
    budget_source: str
    seconds: float
    items_per_second: float
    unit: str
    trials: tuple[Trial, ...]
    next_size: int | None
    next_bytes: int | None
    next_measured: bool
    search_seconds: float
    notes: tuple[str, ...] = ()
    unhindered_size: int | None = None

    @property
    def slowdown(self) -> float | None:
        """The extra time of a token (or row) at the answer over that at the largest batch tried that ran unhindered.

        0.5 means half as long again; 0 where the answer itself ran unhindered; None where nothing did.
        """
        chosen, free = self._chosen, self._largest_free
        if free is None or chosen is None or not free.items_per_second or not chosen.items_per_second:
            return None
        return 0.0 if chosen.ran_free else free.items_per_second / chosen.items_per_second - 1

    @property
    def first_seconds(self) -> float:
        """The part of the search that went into the first step of each size, which traces it and compiles kernels."""
        return sum(trial.first_seconds for trial in self.trials)

    @property
    def repeated_seconds(self) -> float:
        """The part of the search that went into all other steps."""
        return sum(trial.repeated_seconds for trial in self.trials)

    @property
    def _chosen(self) -> Trial | None:
        return next((t for t in reversed(self.trials) if t.batch_size == self.batch_size and t.fits), None)

    @property
    def _largest_free(self) -> Trial | None:
        free = [trial for trial in self.trials if trial.fits and trial.ran_free]
        return max(reversed(free), key=lambda trial: trial.batch_size, default=None)

    @contextmanager
    def applied(self) -> Iterator[AutobatchResult]:
        """Hold the limits that the answer was measured under, while the block trains.

        Yields:
            This result.
        """
        with held_limits(self.limit_bytes, self.cache_limit_bytes):
            yield self

    def to_dict(self) -> dict[str, Json]:
        """Everything, ready for JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        trials = [trial.to_dict() for trial in self.trials]
        spent = {"first_seconds": self.first_seconds, "repeated_seconds": self.repeated_seconds}
        return fields | spent | {"slowdown": self.slowdown, "trials": trials, "notes": list(self.notes)}

    def table(self) -> Table:
        """The answer, and a table of the trials behind it."""
        rows = [
            (
                trial.batch_size,
                _bytes(trial.predicted_bytes),
                _bytes(trial.floor_bytes),
                _bytes(trial.peak_bytes),
                format_limit(trial.limit_bytes),
                None if trial.seconds is None else format_seconds(trial.seconds),
                None if trial.items_per_second is None else f"{trial.items_per_second:,.0f}",
                _verdict(trial, self.batch_size),
            )
            for trial in self.trials
        ]
        columns = ["batch", "predicted", "floor", "peak", "limit", "step", f"{self.unit}/s", "fits"]
        answer = format_batch(self.batch_size, self.accumulation_steps)
        title = f"{answer}: peak {format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}"
        return Table(columns, rows, title=title, notes=[*self._reasons(), *self.notes])

    def _reasons(self) -> list[str]:
        """Remarks on what the table leaves open."""
        lines = [f"budget: {self.budget_source}", "floor: the least that a step of that size needs"]
        if any(trial.limit_bytes <= 1 for trial in self.trials):
            lines.append(
                "under the least possible limit MLX waits after each operation, the slowest way to need the least"
            )
        limit = format_limit(self.limit_bytes)
        lines.append(f"the peak holds under a memory limit of {limit}: in Python, train inside result.applied()")
        if self.next_size is not None and not self.next_measured:
            lines.append(self._untried())
        lines.extend(self._speed())
        if self.repeated_seconds:
            lines.append(
                f"the search took {format_seconds(self.search_seconds)}: {format_seconds(self.first_seconds)} in the "
                f"first step of each size, which traces it and compiles its kernels, "
                f"{format_seconds(self.repeated_seconds)} in other steps"
            )
        footprints = [trial.footprint_bytes for trial in self.trials if trial.footprint_bytes is not None]
        if footprints:
            lines.append(
                f"the whole process took up to {format_bytes(max(footprints))}: a peak counts MLX's arrays, not "
                f"Python, libraries and buffers kept for reuse"
            )
        return lines

    def _untried(self) -> str:
        if self.next_bytes is None:
            return f"batch {self.next_size} was not tried"
        line = f"batch {self.next_size} was not tried: it is predicted to need {_bytes(self.next_bytes)}"
        if self.next_bytes > self.budget_bytes:
            return line
        return f"{line}, too near the budget: on a GPU peaks were up to {format_percent(ESTIMATE_MARGIN, 0)} above that"

    def _speed(self) -> list[str]:
        """The cost of the limit, and the way to ask for less of it."""
        slowdown, free = self.slowdown, self._largest_free
        if free is None:
            return ["at each size that was tried the limit made MLX wait, so what waiting costs is not known"]
        if slowdown is None or slowdown == 0.0:
            return []
        unit = self.unit.removesuffix("s")
        costs = round(slowdown, 2) > 0
        change = f"takes {format_percent(slowdown, 0)} longer" if costs else "takes no longer"
        lines = [
            f"the limit makes batch {self.batch_size} wait, {'and' if costs else 'but'} a {unit} {change} than at "
            f"batch {free.batch_size}, the largest tried that never waits"
        ]
        advice = []
        if self.unhindered_size is not None and self.unhindered_size > free.batch_size:
            advice.append(f"batch {self.unhindered_size} is predicted never to wait either")
        if slowdown > _SLOW:
            advice.append(f"slowdown={_SLOW} asks for the largest batch that loses {format_percent(_SLOW, 0)} at most")
        return [*lines, "; ".join(advice)] if advice else lines

    def plot(self, path: str | os.PathLike[str] | None = None, *, dark: bool = False) -> Figure:
        """Draw predicted and measured peaks against the batch size, and the budget.

        Args:
            path: A file to write, by its ending SVG or PNG.
            dark: For dark pages.

        Returns:
            The matplotlib figure.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from mlx_tune.presentation.plotting import COLORS, bytes_unit, ink, new_figure, save_figure

        figure, axes = new_figure(dark=dark)
        scale, unit = bytes_unit(self.budget_bytes)
        trials = sorted(self.trials, key=lambda trial: trial.batch_size)
        floors = [(t.batch_size, t.floor_bytes / scale) for t in trials if t.floor_bytes is not None]
        foreseen = [(t.batch_size, t.predicted_bytes / scale) for t in trials if t.predicted_bytes is not None]
        peaks = [(t.batch_size, t.peak_bytes / scale) for t in trials if t.peak_bytes is not None]
        if self.next_size is not None and self.next_bytes is not None and not self.next_measured:
            foreseen.append((self.next_size, self.next_bytes / scale))
        axes.plot(*zip(*foreseen, strict=True), color=COLORS[0], marker="x", label="predicted") if foreseen else None
        axes.plot(*zip(*floors, strict=True), color=COLORS[2], ls="", marker="s", label="floor") if floors else None
        axes.plot(*zip(*peaks, strict=True), color=COLORS[1], ls="", marker="o", label="measured") if peaks else None
        axes.axhline(self.budget_bytes / scale, color=COLORS[3], ls="--", label="budget")
        axes.axvline(self.batch_size, color=ink(dark), lw=0.8, ls=":")
        axes.set_xlabel("batch size")
        axes.set_ylabel(f"peak memory ({unit})")
        axes.set_title(f"batch size {self.batch_size}: {format_bytes(self.peak_bytes)}")
        axes.legend(frameon=False, labelcolor=ink(dark))
        return save_figure(figure, path)


def _bytes(size: int | None) -> str | None:
    return None if size is None else format_bytes(size)


def _verdict(trial: Trial, answer: int) -> str:
    if not trial.fits:
        return f"no: {trial.reason}" if trial.reason else "no"
    return "yes, chosen" if trial.batch_size == answer else "yes"
