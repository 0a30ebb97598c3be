"""The search for the smallest memory limit that costs no time, on a machine whose steps scatter and drift.

Pure numbers: running a step is handed in.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mlx_tune.measuring.step import StepTrial

#: How many strides the way from what is held anyway to the free peak is climbed in.
_STRIDES = 5
#: Free steps at the beginning: one makes kernels and fills the cache, the others are timed.
_FREE_FIRST = 4
#: Steps under a limit, and free ones after them, that are timed in one turn; one before them settles the cache.
_TIMED = 2
#: Standard errors that show a limit to be too slow: after one turn, after more, and where no more turns are to be had.
_SHOWN_FIRST, _SHOWN, _SHOWN_LAST = 4.0, 2.5, 1.7
#: Noise of one step that is expected before any is seen, and the number of readings that this is worth.
_NOISE, _NOISE_READINGS = 0.04, 4
#: A step that takes so many times as long, and one more after it, settle the matter: a hiccup seldom comes twice.
_HOPELESS = (2.0, 1.4)
#: A limit that is slower by less than this may be a ridge, with limits that cost nothing below it.
_RIDGE = 0.12


class _Reading(NamedTuple):
    """One timed step: when it ran, counted in steps, and the logarithm of its seconds."""

    at: int
    log: float


@dataclass(frozen=True)
class LimitTrial:
    """One limit, measured.

    Attributes:
        limit_bytes: The memory limit.
        peak_bytes: The highest peak of a step under it.
        seconds: The fastest step under it.
        slowdown: The extra time of a step over free ones run before and after it; 0.02 is two per cent.
        uncertainty: The standard error of `slowdown`.
        fits: True where it was not shown that the slowdown is more than allowed.
    """

    limit_bytes: int
    peak_bytes: int
    seconds: float
    slowdown: float
    uncertainty: float
    fits: bool


class LimitSearch:
    """Climbs to the first limit that costs no time, bisects below it, looks behind ridges, and asks the answer again.

    A limit counts as too slow only where that is shown. Noise is estimated from all steps together, since single limits
    see too few; free steps are compared with the limited ones nearest in time, since machines drift. A limited step
    empties the cache of buffers that a free one would have used, so that the first step after every change of limit is
    not timed.

    Args:
        run: Runs one step under a limit, or freely for None.
        slowdown: The extra time that is allowed; 0.02 is two per cent.
        most_timed: The most steps under one limit that are timed before it counts as fast enough, if it was not shown
            to be slow.
        most_steps: The most steps in all.
        told: Called with each limit that was tried, as it stands then.

    Attributes:
        free: The free steps, as measured.
    """

    def __init__(
        self,
        run: Callable[[int | None], StepTrial],
        *,
        slowdown: float,
        most_timed: int = 4,
        most_steps: int = 60,
        told: Callable[[LimitTrial], object] = lambda trial: None,
    ) -> None:
        """Begin with nothing measured."""
        self._run, self._allowed = run, math.log1p(slowdown)
        self._turns, self._timed = max(1, math.ceil(most_timed / _TIMED)), min(_TIMED, most_timed)
        self._most, self._steps, self._told = most_steps, 0, told
        self.free: list[StepTrial] = []
        self._free: list[_Reading] = []
        self._limited: dict[int, list[_Reading]] = {}
        self._measured: dict[int, list[StepTrial]] = {}
        self._fits: dict[int, bool] = {}

    def begin(self) -> int:
        """Time free steps; their highest peak in bytes."""
        self._run_free(_FREE_FIRST - 1)
        return max(trial.peak_bytes for trial in self.free)

    def trials(self, low: int, high: int, resolution: int) -> list[LimitTrial]:
        """Search between two limits.

        Time need not fall with every byte more: on one GPU a step ran as fast under 8 GB as without a limit and three
        per cent slower under 11. Bisection alone would stop above such a ridge.

        Args:
            low: A limit that nothing can run under at speed, in bytes.
            high: A limit that costs nothing.
            resolution: When to stop, in bytes.

        Returns:
            Every limit that was tried, in the order of the first try.
        """
        start = low
        while start < high and self._room(2):
            start = self._climb(start, high, resolution, stride=(high - low) // _STRIDES)
            self._look_behind_ridges(low, high, resolution)
            self._ask_again()
            if self._fitting():
                break
        return [self._trial(limit) for limit in self._fits]

    def _climb(self, low: int, high: int, resolution: int, stride: int) -> int:
        """Go up to the first limit that costs no time, and bisect the last stride; how far up that was."""
        reached = high
        while reached - low > resolution and stride > 0 and low + stride < reached and self._room(2):
            if self._fast_enough(low + stride, self._turns):
                reached = low + stride
            else:
                low += stride
        self._bisect(low, reached, resolution, spare=2)
        return reached

    def _bisect(self, low: int, high: int, resolution: int, spare: int) -> None:
        while high - low > resolution and self._room(1 + spare):
            middle = (low + high) // 2
            if self._fast_enough(middle, self._turns):
                high = middle
            else:
                low = middle

    def _look_behind_ridges(self, low: int, high: int, resolution: int) -> None:
        looked: set[int] = set()
        while self._room(2):
            best = min(self._fitting(), default=high)
            slow = sorted(limit for limit, fits in self._fits.items() if not fits)
            ridges = [x for x in slow if x < best and x not in looked and self._slowdown(x)[0] < math.log1p(_RIDGE)]
            if not ridges:
                return
            looked.add(ridges[0])
            below = max((limit for limit in slow if limit < ridges[0]), default=low)
            middle = (below + ridges[0]) // 2
            if ridges[0] - below > 2 * resolution and self._fast_enough(middle, self._turns):
                self._bisect(below, middle, resolution, spare=1)

    def _ask_again(self) -> None:
        """Measure the answer once more, and the next one where luck had made it fit."""
        asked: set[int] = set()
        while self._fitting() and self._room(1):
            best = min(self._fitting())
            if best in asked:
                return
            asked.add(best)
            self._run_free(_TIMED)
            before = len(self._limited[best])
            if self._fast_enough(best, 1):  # by all its steps together, and by the new ones alone
                log, error = self._slowdown(best, since=before)
                self._fits[best] = log - _SHOWN_FIRST * error <= self._allowed

    def _fitting(self) -> list[int]:
        return [limit for limit, fits in self._fits.items() if fits]

    def _room(self, turns: int) -> bool:
        return self._steps + turns * (2 * _TIMED + 2) <= self._most

    def _fast_enough(self, limit: int, turns: int) -> bool:
        self._fits[limit] = self._judge(limit, turns)
        self._told(self._trial(limit))
        return self._fits[limit]

    def _judge(self, limit: int, turns: int) -> bool:
        readings = self._limited.setdefault(limit, [])
        for turn in range(turns):
            if turn:
                self._run_free(_TIMED)
            first = self._run_limited(limit)
            second = self._run_limited(limit)
            readings.append(second)
            if all(self._behind(r) > math.log(most) for r, most in zip((first, second), _HOPELESS, strict=True)):
                return False
            readings += [self._run_limited(limit) for _ in range(self._timed - 1)]
            log, error = self._slowdown(limit)
            if log - (_SHOWN if len(readings) > _TIMED else _SHOWN_FIRST) * error > self._allowed:
                return False
            if (turn or turns == 1) and log <= self._allowed:
                return True
            if not self._room(1):
                break
        return log - _SHOWN_LAST * error <= self._allowed

    def _run_free(self, timed: int) -> None:
        for settled in (False, *[True] * timed):
            self.free.append(self._run(None))
            self._steps += 1
            if settled:
                self._free.append(_Reading(self._steps, math.log(self.free[-1].seconds)))

    def _run_limited(self, limit: int) -> _Reading:
        trial = self._run(limit)
        self._measured.setdefault(limit, []).append(trial)
        self._steps += 1
        return _Reading(self._steps, math.log(trial.seconds))

    def _behind(self, reading: _Reading) -> float:
        """The logarithm of a step's time over that of free ones near it."""
        near = sorted(self._free, key=lambda free: abs(free.at - reading.at))[: 2 * _TIMED]
        return reading.log - statistics.median(free.log for free in near)

    def _slowdown(self, limit: int, since: int = 0) -> tuple[float, float]:
        """The logarithm of a limited step's time over a free one's, and its standard error."""
        logs = [self._behind(reading) for reading in self._limited[limit][since:]]
        # Of two, the faster: one hiccup must not decide.
        log = statistics.median(logs) if len(logs) > _TIMED else min(logs)
        return log, self._noise() * math.sqrt(1.25 / len(logs) + 1.25 / min(2 * _TIMED, len(self._free)))

    def _noise(self) -> float:
        """The scatter of the logarithm of one step's time."""
        steps = [b.log - a.log for r in (self._free, *self._limited.values()) for a, b in itertools.pairwise(r)]
        # 1.4826 makes a median of distances a standard deviation; a difference scatters by the root of two more.
        seen = 1.4826 * statistics.median(map(abs, steps)) / math.sqrt(2) if steps else 0.0
        count = len(steps)
        return math.sqrt((seen**2 * count + _NOISE**2 * _NOISE_READINGS) / (count + _NOISE_READINGS))

    def _trial(self, limit: int) -> LimitTrial:
        log, error = self._slowdown(limit)
        measured = self._measured[limit]
        return LimitTrial(
            limit_bytes=limit,
            peak_bytes=max(trial.peak_bytes for trial in measured),
            seconds=min(trial.seconds for trial in measured),
            slowdown=math.expm1(log),
            uncertainty=error,
            fits=self._fits[limit],
        )
