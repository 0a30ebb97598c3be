"""The result of `autofit`: the choice, what it was chosen from, and a way to train under it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from mlx_tune.checkpointing.planning.ways import apply_choice
from mlx_tune.memory import held_limits
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import format_batch, format_bytes, format_seconds

if TYPE_CHECKING:
    import mlx.nn as nn
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Setting:
    """A batch size with a choice of blocks, as predicted and, where it was run, as measured.

    Attributes:
        batch_size: Rows in a step.
        checkpointed: The number of checkpointed blocks.
        floor_bytes: The least that the step needs, from its graph.
        predicted_rate: Tokens or rows a second, predicted.
        limit_bytes: The memory limit it was run under; None where it was not run.
        peak_bytes: Its measured peak; None where it was not run, or ran out of memory.
        seconds: Its fastest step; None likewise.
        rate: Tokens or rows a second, measured; None likewise.
        fits: True where its measured peak is within the budget; None where it was not run.
        unbeaten: True where no other setting needs less memory and is predicted to be faster.
        known_as: Why anybody would try it without a search, such as "mlx-lm's default batch"; else empty.
        behind: The extra time of a row over that under the fastest setting, the median over turns of both: 0.02 is two
            per cent; None where it was not timed in turns with others.
        uncertainty: The standard error of `behind`; None after a single turn.
        turns: The number of turns it was timed in.
        chosen: True where it is the one to train with.
        loss: "plain" or "linear", where the step came with both; else empty.
    """

    batch_size: int
    checkpointed: int
    floor_bytes: int
    predicted_rate: float
    limit_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    rate: float | None = None
    fits: bool | None = None
    unbeaten: bool = True
    known_as: str = ""
    behind: float | None = None
    uncertainty: float | None = None
    turns: int = 0
    chosen: bool = False
    loss: str = ""


@dataclass(frozen=True)
class Fit(Tabular):
    """Checkpoints, batch size, accumulation and memory limit that give the most tokens a second within a budget.

    Attributes:
        batch_size: Rows in a step.
        accumulation_steps: Steps that make up one update of the target batch; 1 without a target.
        paths: The blocks to checkpoint.
        found: The number of blocks to choose from; 0 where checkpoints were left as they are.
        limit_bytes: The memory limit to train under.
        cache_limit_bytes: The cache limit that goes with it, or None where none is needed.
        budget_bytes: The limit of the peak.
        budget_source: Where the budget comes from.
        predicted_peak_bytes: The least that the step needs, from its graph.
        peak_bytes: The highest peak of the real steps under the limit.
        predicted_rate: Tokens or rows a second, from other steps.
        measured_rate: Tokens or rows a second of the fastest real step.
        measured_seconds: That step's time.
        unit: "tokens" or "rows".
        trials: The settings to choose from, run or predicted only, by rising floor.
        search_seconds: The time of the search.
        notes: Further remarks.
        loss: "plain" or "linear", where the step came with both; else empty.
    """

    batch_size: int
    accumulation_steps: int
    paths: tuple[str, ...]
    found: int
    limit_bytes: int
    cache_limit_bytes: int | None
    budget_bytes: int
    budget_source: str
    predicted_peak_bytes: int
    peak_bytes: int
    predicted_rate: float
    measured_rate: float
    measured_seconds: float
    unit: str
    trials: tuple[Setting, ...]
    search_seconds: float
    notes: tuple[str, ...]
    loss: str = field(default="", kw_only=True)
    _model: nn.Module = field(repr=False, compare=False)

    @property
    def frontier(self) -> tuple[Setting, ...]:
        """The settings that no other beats in both memory and predicted rate, by rising memory."""
        return tuple(s for s in self.trials if s.unbeaten)

    @contextmanager
    def applied(self) -> Iterator[Fit]:
        """Checkpoint the blocks and hold the limits that the fit was measured under, while the block trains.

        Yields:
            This fit.
        """
        undo = apply_choice(self._model, self.paths)
        try:
            with held_limits(self.limit_bytes, self.cache_limit_bytes):
                yield self
        finally:
            undo()

    def table(self) -> Table:
        """The settings, and the choice above them."""
        rows: list[list[object]] = [
            [
                s.batch_size,
                f"{s.checkpointed} of {self.found}" if self.found else "",
                *([s.loss] if self.loss else []),
                format_bytes(s.floor_bytes),
                f"{s.predicted_rate:,.0f}",
                "" if s.peak_bytes is None else format_bytes(s.peak_bytes),
                "" if s.seconds is None else format_seconds(s.seconds),
                "" if s.rate is None else f"{s.rate:,.0f}",
                _in_turns(s),
                _remark(s),
            ]
            for s in self.trials
            if s.unbeaten or s.known_as or s.fits is not None
        ]
        batch = format_batch(self.batch_size, self.accumulation_steps)
        unit, one, rate = f"{self.unit}/s", self.unit.removesuffix("s"), f"{self.measured_rate:,.0f}"
        blocks = f"{len(self.paths)} of {self.found} blocks checkpointed, " if self.found else ""
        blocks += f"{self.loss} loss, " if self.loss else ""
        return Table(
            [
                "batch",
                "checkpointed",
                *(["loss"] if self.loss else []),
                "floor",
                f"predicted {unit}",
                "peak",
                "step",
                f"measured {unit}",
                f"time a {one}",
                "",
            ],
            rows,
            title=f"Chosen within {format_bytes(self.budget_bytes)}: {batch}, {blocks}{rate} {unit}",
            notes=[
                f"Budget: {self.budget_source}.",
                f"Floor: the least memory that a step needs, from its graph. Time a {one}: how much longer than under "
                f"the fastest setting, with the standard error, where both ran in turns.",
                *self._reason(),
                f"Peak: at least {format_bytes(self.predicted_peak_bytes)} predicted, "
                f"{format_bytes(self.peak_bytes)} measured under a memory limit of "
                f"{format_bytes(self.limit_bytes)}: in Python, train inside fit.applied().",
                *self.notes,
            ],
        )

    def _reason(self) -> list[str]:
        """The reason for choosing another setting than the fastest."""
        chosen = next((s for s in self.trials if s.chosen), None)
        fastest = next((s for s in self.trials if s.behind == 0), None)
        if chosen is None or fastest is None or not chosen.behind or not chosen.behind > 0:
            return []
        lower = (chosen.peak_bytes or 0) < (fastest.peak_bytes or 0)
        why = "its peak is lower" if lower else "smaller batches are chosen only where they are clearly faster"
        return [f"Not the fastest was chosen, but one that counts as equally fast ({chosen.behind:+.1%}): {why}."]

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if not name.startswith("_")}
        return {
            **plain,
            "paths": list(self.paths),
            "notes": list(self.notes),
            "trials": [asdict(s) for s in self.trials],
        }

    def plot(self, path: str | os.PathLike[str] | None = None, *, dark: bool = False) -> Figure:
        """Draw rate against memory: what was predicted, what was measured, and the budget.

        Args:
            path: A file that ends in .svg or .png.
            dark: For dark pages.

        Returns:
            The matplotlib figure.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from mlx_tune.presentation.plotting import COLORS, bytes_unit, ink, new_figure, save_figure

        figure, axes = new_figure(dark=dark)
        scale, unit = bytes_unit(self.budget_bytes)
        frontier = self.frontier
        axes.plot(
            [s.floor_bytes / scale for s in frontier],
            [s.predicted_rate for s in frontier],
            color=COLORS[0],
            marker="x",
            label="predicted, at its floor",
        )
        run = [(s.peak_bytes / scale, s.rate) for s in self.trials if s.peak_bytes is not None and s.rate is not None]
        axes.plot([x for x, _ in run], [y for _, y in run], color=COLORS[1], ls="", marker="o", label="measured")
        axes.plot(
            self.peak_bytes / scale,
            self.measured_rate,
            color=COLORS[2],
            ls="",
            marker="*",
            ms=14,
            label="chosen",
        )
        axes.axvline(self.budget_bytes / scale, color=COLORS[3], ls="--", label="budget")
        axes.set_xlabel(f"peak memory ({unit})")
        axes.set_ylabel(f"{self.unit} per second")
        axes.set_title(f"batch size {self.batch_size}, {len(self.paths)} of {self.found} blocks checkpointed")
        axes.legend(frameon=False, labelcolor=ink(dark))
        return save_figure(figure, path)


def _in_turns(setting: Setting) -> str:
    """The distance behind the fastest."""
    if setting.behind is None:
        return ""
    if setting.behind == 0:
        return "fastest"
    doubt = "" if setting.uncertainty is None else f" ± {setting.uncertainty:.1%}"
    return f"{setting.behind:+.1%}{doubt}"


def _remark(setting: Setting) -> str:
    remarks = ["chosen"] if setting.chosen else []
    if setting.fits is False:
        remarks = ["over the budget" if setting.peak_bytes is not None else "ran out of memory"]
    return ", ".join([*remarks, *([setting.known_as] if setting.known_as else [])])
