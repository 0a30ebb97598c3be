"""The result of `lm.autobatch_generate`."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The knee is the smallest batch with this share of the best rate.
KNEE = 0.9


@dataclass(frozen=True)
class GenerationTrial:
    """One batch size, measured.

    Attributes:
        batch_size: Rows.
        predicted_bytes: The peak foreseen before; None where nothing was known.
        prompt_peak_bytes: The peak while the last prompts were read.
        peak_bytes: The peak over reading prompts and writing the last tokens.
        seconds: Time for one more token in every row, with the cache at its final length.
        fits: True where the peak stays within the budget.
    """

    batch_size: int
    predicted_bytes: int | None
    prompt_peak_bytes: int
    peak_bytes: int
    seconds: float
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """Tokens written a second, all rows together."""
        return self.batch_size / self.seconds

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class GenerationBatchResult(Tabular):
    """The largest batch for generation, and what every smaller one gives.

    Attributes:
        batch_size: The largest that fits.
        prompt_tokens: Tokens in a prompt.
        max_tokens: Tokens generated for each.
        kv_bits: Bits of keys and values; None for the model's own type.
        cache_bytes_per_row: The memory of one row's cache near its final length.
        budget_bytes: The limit of peaks.
        budget_source: Where the budget comes from.
        trials: Every size measured, in order of size.
        next_bytes: The peak predicted for one row more than the answer; None where that was tried, or `max_batch`
            ended the search.
        search_seconds: The time that it took.
        notes: Further remarks.
    """

    batch_size: int
    prompt_tokens: int
    max_tokens: int
    kv_bits: int | None
    cache_bytes_per_row: int
    budget_bytes: int
    budget_source: str
    trials: tuple[GenerationTrial, ...]
    next_bytes: int | None
    search_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def knee(self) -> int:
        """The smallest batch that fits with 90 % of the best rate: beyond it, rows wait longer for little."""
        fitting = [trial for trial in self.trials if trial.fits]
        best = max(trial.tokens_per_second for trial in fitting)
        return min(trial.batch_size for trial in fitting if trial.tokens_per_second >= KNEE * best)

    def table(self) -> Table:
        """The answer and the table."""
        remarks = {1: "lowest latency", self.knee: "knee", self.batch_size: "largest"}
        if self.knee == self.batch_size:
            remarks[self.knee] = "largest, knee"
        rows = [
            [
                trial.batch_size,
                "" if trial.predicted_bytes is None else format_bytes(trial.predicted_bytes),
                format_bytes(trial.prompt_peak_bytes),
                format_bytes(trial.peak_bytes),
                format_seconds(trial.seconds),
                f"{trial.tokens_per_second:,.1f}",
                remarks.get(trial.batch_size, "") if trial.fits else "does not fit",
            ]
            for trial in self.trials
        ]
        cache = "" if self.kv_bits is None else f", {self.kv_bits}-bit cache"
        notes = [f"The cache takes {format_bytes(self.cache_bytes_per_row)} a row; budget: {self.budget_source}."]
        if self.next_bytes is not None:
            notes.append(f"Batch {self.batch_size + 1} is predicted at {format_bytes(self.next_bytes)}; not tried.")
        return Table(
            ["batch", "predicted", "reading", "peak", "a token", "tokens/s", ""],
            rows,
            title=f"Largest batch to generate {self.max_tokens} tokens after {self.prompt_tokens}{cache}: "
            f"{self.batch_size}",
            notes=[*notes, *self.notes],
        )

    def to_dict(self) -> dict[str, Json]:
        """Ready for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        trials = [trial.to_dict() for trial in self.trials]
        return {**plain, "knee": self.knee, "trials": trials, "notes": list(self.notes)}

    def plot(self, path: str | os.PathLike[str] | None = None, *, dark: bool = False) -> Figure:
        """Draw the rate of all rows against the time that each waits for a token.

        Args:
            path: A file to write, by its ending SVG or PNG.
            dark: For dark pages.

        Returns:
            The matplotlib figure.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from mlx_tune.presentation.plotting import COLORS, ink, new_figure, save_figure

        figure, axes = new_figure(dark=dark)
        points = [(1000 * t.seconds, t.tokens_per_second, t.batch_size) for t in self.trials if t.fits]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=COLORS[0], marker="o")
        for x, y, size in points:
            axes.annotate(str(size), (x, y), textcoords="offset points", xytext=(6, -10), color=ink(dark))
        axes.set_xlabel("time for a token of one row (ms)")
        axes.set_ylabel("tokens a second, all rows")
        axes.set_title(f"largest batch {self.batch_size}, knee {self.knee}")
        return save_figure(figure, path)
