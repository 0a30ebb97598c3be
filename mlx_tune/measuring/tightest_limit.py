"""`tightest_limit`: the least memory limit that costs next to no speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.garbage import quick_collections
from mlx_tune.graphs.tracing.trace import taking
from mlx_tune.interrupts import uninterrupted
from mlx_tune.measuring.half_precision import slow_half_precision
from mlx_tune.measuring.limit_search import LimitSearch, LimitTrial
from mlx_tune.measuring.step import StepTrial, run_step
from mlx_tune.memory import held_limits
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.progress import progress_bar
from mlx_tune.state import Snapshot
from mlx_tune.trees import arrays_of
from mlx_tune.units import format_bytes, format_percent, format_seconds, whole_number

#: Limits closer to each other than this share of the free peak are not told apart.
RESOLUTION = 0.01


@dataclass(frozen=True)
class TightestLimit(Tabular):
    """The smallest memory limit found whose steps run at nearly full speed.

    Attributes:
        limit_bytes: The limit.
        peak_bytes: The highest peak of a step under it.
        seconds: The fastest step under it.
        free_peak_bytes: The highest peak without it.
        free_seconds: The fastest step without it.
        resident_bytes: The memory that is held before a step starts: no limit gets below.
        slowdown: The slowdown that was allowed.
        trials: Every limit that was measured, in the order tried.
        notes: Further remarks.
    """

    limit_bytes: int
    peak_bytes: int
    seconds: float
    free_peak_bytes: int
    free_seconds: float
    resident_bytes: int
    slowdown: float
    trials: tuple[LimitTrial, ...]
    notes: tuple[str, ...] = ()

    @contextmanager
    def applied(self) -> Iterator[TightestLimit]:
        """Hold the limit while the block trains.

        Yields:
            This result.

        Examples:
            >>> import mlx.core as mx
            >>> best = tightest_limit(lambda x: (x @ x).sum(), mx.ones((64, 64)), repeats=1, progress=False)
            >>> with best.applied():
            ...     mx.set_memory_limit(best.limit_bytes) == best.limit_bytes
            True
        """
        with held_limits(self.limit_bytes, None):
            yield self

    def table(self) -> Table:
        """The table of limits, smallest first."""
        rows: list[list[object]] = [
            [
                format_bytes(t.limit_bytes),
                format_bytes(t.peak_bytes),
                format_seconds(t.seconds),
                f"{t.slowdown:+.1%}" + (f" ± {t.uncertainty:.1%}" if t.uncertainty < 1 else ""),
                "chosen" if t.limit_bytes == self.limit_bytes else ("" if t.fits else "too slow"),
            ]
            for t in sorted(self.trials, key=lambda t: t.limit_bytes)
        ]
        rows.append(["none", format_bytes(self.free_peak_bytes), format_seconds(self.free_seconds), "", ""])
        saved = max(0, self.free_peak_bytes - self.peak_bytes)
        return Table(
            ["limit", "peak", "step", "slowdown", ""],
            rows,
            title=f"Tightest memory limit under which steps take at most {format_percent(self.slowdown)} longer: "
            f"{format_bytes(self.limit_bytes)}",
            notes=[
                f"Saves {format_bytes(saved)} of the peak without a limit "
                f"({format_percent(saved / max(1, self.free_peak_bytes))}); {format_bytes(self.resident_bytes)} are "
                f"held before the step starts.",
                *self.notes,
            ],
        )

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        from dataclasses import asdict

        return {**asdict(self), "notes": list(self.notes), "trials": [asdict(t) for t in self.trials]}


def tightest_limit(
    step: Callable[..., object],
    *args: object,
    state: object = (),
    slowdown: float = 0.02,
    repeats: int = 4,
    progress: bool = True,
) -> TightestLimit:
    """Measure the smallest memory limit under which a step still runs at nearly full speed.

    MLX queues work ahead of the device, and what is queued holds memory. A limit makes it wait (transforms.cpp).
    A little waiting costs nothing and takes most of that memory back; a limit near what the step needs at the very
    least makes it many times slower. This looks for the knee: it runs the step without a limit and under limits
    between what is held anyway and the free peak, in turns since machines drift, and bisects. A limit counts as too
    slow only where that is shown, by the noise of all steps together; the answer is measured twice.

    The step is run for real, at most some 60 times. The contents of `state` and the random streams are put back
    afterwards.

    Args:
        step: `step(*args)` runs one training step and returns arrays.
        *args: The step's arguments, evaluated or not; a single tuple or dictionary is spread over the step's
            arguments where it takes more than one.
        state: Objects that the step changes: `(model, optimizer)`.
        slowdown: The extra time that a step may take over a free one; 0.02 is two per cent.
        repeats: The most steps timed under one limit before it counts as fast enough, if not shown to be too slow;
            fewer where the answer is clear.
        progress: Show a progress line on standard error.

    Returns:
        The limit, with the table of limits, peaks and times it was chosen from.

    Raises:
        InvalidArgumentError: `slowdown` is negative, `repeats` below 1, or the step takes no such batch.
        TrialError: The step returns no array.
        DiskError: Too little free disk for what waits there meanwhile.

    Examples:
        >>> import mlx.core as mx
        >>> best = tightest_limit(lambda x: (x @ x).sum(), mx.ones((64, 64)), repeats=1, progress=False)
        >>> best.limit_bytes <= best.free_peak_bytes
        True
    """
    if not slowdown >= 0:
        raise InvalidArgumentError(f"slowdown={slowdown!r}: give a share from 0 up, such as 0.02 for two per cent.")
    repeats = whole_number(repeats, "repeats", least=1)
    import mlx.core as mx

    mx.eval(list(arrays_of(args)), list(arrays_of(state)))
    with (
        uninterrupted(),
        quick_collections(),
        Snapshot(state, spill=True),
        progress_bar("tightest limit", enabled=progress) as bar,
    ):
        notes = slow_half_precision((args, state), bar)
        step = taking(step, args, state)
        bar.update(text="warming up")
        run_step(step, args, state)  # traces, kernels and the optimizer's state are made in the first step
        resident = mx.get_active_memory()

        def run(limit: int | None) -> StepTrial:
            bar.update(text="no limit" if limit is None else f"limit {format_bytes(limit)}")
            return run_step(step, args, state, limit)

        def ended(trial: LimitTrial) -> None:
            bar.ended(f"limit {format_bytes(trial.limit_bytes)}: {trial.slowdown:+.1%} in time")

        search = LimitSearch(run, slowdown=slowdown, most_timed=repeats, told=ended)
        high = search.begin()
        trials = search.trials(resident, high, max(1, int(RESOLUTION * high)))
    free = search.free
    best = min((t for t in trials if t.fits), key=lambda t: t.limit_bytes, default=None)
    free_peak, free_seconds = max(t.peak_bytes for t in free), min(t.seconds for t in free)
    if best is None:
        notes.append("Each lower limit that was tried was too slow: this one is the peak without a limit.")
    elif free_peak - best.peak_bytes < 0.02 * free_peak:
        notes.append("A limit saves this step next to nothing: what it holds at its peak, it needs.")
    return TightestLimit(
        limit_bytes=best.limit_bytes if best else free_peak,
        peak_bytes=best.peak_bytes if best else free_peak,
        seconds=best.seconds if best else free_seconds,
        free_peak_bytes=free_peak,
        free_seconds=free_seconds,
        resident_bytes=resident,
        slowdown=slowdown,
        trials=tuple(trials),
        notes=tuple(notes),
    )
