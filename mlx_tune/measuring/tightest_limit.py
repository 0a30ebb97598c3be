"""`tightest_limit`: the least memory limit that costs next to no speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.garbage import quick_collections
from mlx_tune.graphs.tracing.trace import taking
from mlx_tune.interrupts import uninterrupted
from mlx_tune.measuring.half_precision import slow_half_precision
from mlx_tune.measuring.step import StepTrial, run_step
from mlx_tune.measuring.turns import compare
from mlx_tune.memory import held_limits
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.progress import progress_bar
from mlx_tune.state import Snapshot
from mlx_tune.trees import arrays_of
from mlx_tune.units import format_bytes, format_percent, format_seconds, whole_number

#: Limits closer to each other than this share of the free peak are not told apart.
RESOLUTION = 0.01

#: How many strides the way from what is held anyway to the free peak is climbed in.
_STRIDES = 5


@dataclass(frozen=True)
class LimitTrial:
    """One limit, measured.

    Attributes:
        limit_bytes: The memory limit.
        peak_bytes: The highest peak of a step under it.
        seconds: The fastest step under it.
        slowdown: The extra time of a step over a free one run in turns with it; 0.02 is two per cent.
        uncertainty: The standard error of `slowdown`.
        fits: True where the slowdown is allowed.
    """

    limit_bytes: int
    peak_bytes: int
    seconds: float
    slowdown: float
    uncertainty: float
    fits: bool


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

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        from dataclasses import asdict

        return {**asdict(self), "notes": list(self.notes), "trials": [asdict(t) for t in self.trials]}


def tightest_limit(
    step: Callable[..., object],
    *args: object,
    state: object = (),
    slowdown: float = 0.02,
    repeats: int = 6,
    progress: bool = True,
) -> TightestLimit:
    """Measure the smallest memory limit under which a step still runs at nearly full speed.

    MLX queues work ahead of the device, and what is queued holds memory. A limit makes it wait (transforms.cpp).
    A little waiting costs nothing and takes most of that memory back; a limit near what the step needs at the very
    least makes it many times slower. This looks for the knee: it runs the step without a limit and under limits
    between what is held anyway and the free peak, in turns so that a busy machine falsifies nothing, and bisects. The
    answer is measured twice.

    The step is run for real, some 40 to 100 times. The contents of `state` and the random streams are put back
    afterwards.

    Args:
        step: `step(*args)` runs one training step and returns arrays.
        *args: The step's arguments, evaluated or not; a single tuple or dictionary is spread over the step's
            arguments where it takes more than one.
        state: Objects that the step changes: `(model, optimizer)`.
        slowdown: The extra time that a step may take over a free one; 0.02 is two per cent.
        repeats: The most turns of a free and a limited step for one limit; fewer where the answer is clear.
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
        for _ in range(2):  # traces, kernels and the optimizer's state are made in the first steps
            run_step(step, args, state)
            bar.update(text="warming up")
        resident = mx.get_active_memory()
        free = [run_step(step, args, state) for _ in range(2)]
        high = max(trial.peak_bytes for trial in free)

        def measure(limit: int) -> LimitTrial:
            bar.update(text=f"limit {format_bytes(limit)}")
            limited: list[StepTrial] = []

            def one_free() -> float:
                free.append(run_step(step, args, state))
                return free[-1].seconds

            def one_limited() -> float:
                limited.append(run_step(step, args, state, limit))
                return limited[-1].seconds

            seen = compare(one_free, one_limited, threshold=1 + slowdown, most_turns=repeats)
            bar.ended(f"limit {format_bytes(limit)}: {seen.ratio - 1:+.1%} in time")
            return LimitTrial(
                limit_bytes=limit,
                peak_bytes=max(t.peak_bytes for t in limited),
                seconds=min(t.seconds for t in limited),
                slowdown=seen.ratio - 1,
                uncertainty=seen.uncertainty,
                fits=seen.ratio <= 1 + slowdown,
            )

        trials = confirmed(measure, smallest_fitting(measure, resident, high, max(1, int(RESOLUTION * high))))
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


def smallest_fitting(measure: Callable[[int], LimitTrial], low: int, high: int, resolution: int) -> list[LimitTrial]:
    """Climb from below in a few strides to the first limit that fits, then bisect the last stride.

    Time need not fall with every byte more: on one GPU a step ran as fast under 8 GB as without a limit and three per
    cent slower under 11. Bisection alone would stop above such a ridge.

    Args:
        measure: Measures one limit.
        low: A limit that nothing can run under at speed.
        high: A limit that costs nothing.
        resolution: When to stop, in bytes.

    Returns:
        Every trial, in the order tried. Where fitting is monotonic, the smallest one that fits is within
        `resolution` of the smallest that there is.
    """
    trials: list[LimitTrial] = []
    stride = (high - low) // _STRIDES
    while high - low > resolution and stride > 0 and low + stride < high:
        trials.append(measure(low + stride))
        if trials[-1].fits:
            high = low + stride
            break
        low += stride
    while high - low > resolution:
        middle = (low + high) // 2
        trials.append(measure(middle))
        if trials[-1].fits:
            high = middle
        else:
            low = middle
    return trials


def confirmed(measure: Callable[[int], LimitTrial], trials: list[LimitTrial]) -> list[LimitTrial]:
    """Measure the smallest limit that fits once more, and the next one where luck had made it fit.

    Args:
        measure: Measures one limit.
        trials: The measurements of a search.

    Returns:
        The trials, those measured again with their second times and the higher of their peaks. The smallest that fits
        among them has fitted twice.
    """
    trials, again = list(trials), set[int]()
    while True:
        fitting = [i for i, trial in enumerate(trials) if trial.fits]
        if not fitting:
            return trials
        best = min(fitting, key=lambda i: trials[i].limit_bytes)
        if best in again:
            return trials
        again.add(best)
        second = measure(trials[best].limit_bytes)
        trials[best] = replace(second, peak_bytes=max(second.peak_bytes, trials[best].peak_bytes))
