"""Which of several ways is fastest, on a machine that is never quite still.

Pure numbers: running a way once is handed in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Before so many turns nothing is decided, except for ways that are hopeless.
_LEAST_TURNS = 3
#: A way that took so many times as long as the fastest in the first turn is left out; in both of the first two turns.
#: A hiccup of the machine makes a step two or three times as long, but seldom twice running.
_HOPELESS = (4.0, 1.4)
#: Student's t: how many standard errors are clear, after three turns, four, and so on.
_CLEAR = (4.3, 3.2, 2.8, 2.6, 2.5, 2.4, 2.3)


@dataclass(frozen=True)
class Standing:
    """Where one way came in.

    Attributes:
        behind: The extra time over the fastest, the median over the turns that both were in: 0.02 is two per
            cent, 0 the fastest itself. Infinite for a way that gave up.
        uncertainty: The standard error of that.
        turns: The number of turns it was in.
        seconds: The median of its own times.
    """

    behind: float
    uncertainty: float
    turns: int
    seconds: float


def race(ways: Sequence[Callable[[], float]], *, tolerance: float, most_turns: int) -> list[Standing]:
    """Run several ways in turns until it is clear which of them are as fast as the fastest.

    A machine that is slow for a while slows down all ways of a turn, so that ratios within turns say more than times
    do, and medians more than means. The order alternates from turn to turn. A way that is clearly slower leaves; where
    all others are clearly slower, or clearly no slower than by twice the tolerance, the race ends.

    Args:
        ways: Each runs one way once and returns its seconds, infinity to give up.
        tolerance: Differences up to this share are of no interest.
        most_turns: After so many turns the medians decide, however unclear they are.

    Returns:
        The standing of each way, in the order given.

    Examples:
        >>> [round(s.behind, 2) for s in race([lambda: 2.0, lambda: 1.0], tolerance=0.02, most_turns=5)]
        [1.0, 0.0]
    """
    seconds: list[list[float]] = [[] for _ in ways]
    running = list(range(len(ways)))
    turns = 0
    while len(running) > 1 and turns < most_turns:
        for i in running if turns % 2 == 0 else running[::-1]:
            seconds[i].append(ways[i]())
        turns += 1
        running = [i for i in running if math.isfinite(seconds[i][-1])]
        if running:
            first = _fastest(seconds, running)
            running = [i for i in running if i == first or not _clearly_slower(seconds[i], seconds[first], tolerance)]
            if turns >= _LEAST_TURNS and all(_level(seconds[i], seconds[first], tolerance) for i in running):
                break
    # Where all that were left have given up, those that had to leave as too slow are better than nothing.
    running = running or [i for i, times in enumerate(seconds) if math.isfinite(times[-1])]
    fastest = seconds[_fastest(seconds, running)] if running else []
    return [_standing(times, fastest) for times in seconds]


@dataclass(frozen=True)
class Comparison:
    """Two ways of doing the same, timed in turns.

    Attributes:
        ratio: Time of the second over that of the first; the median over the turns.
        uncertainty: The standard error of the ratio, relative; infinite after a single turn.
        turns: The number that were run.
    """

    ratio: float
    uncertainty: float
    turns: int


def compare(
    first: Callable[[], float], second: Callable[[], float], *, threshold: float, most_turns: int = 6
) -> Comparison:
    """Time two ways in turns until it is clear on which side of a threshold their ratio lies.

    Turns take away what changes slowly: other processes, the clock of a warm machine. The order within a turn
    alternates, so that neither way always runs after the other.

    Args:
        first: Runs the one way once and returns its seconds.
        second: The same for the other.
        threshold: The ratio in question.
        most_turns: After so many turns the median decides, however unclear.

    Returns:
        The ratio and how sure it is.

    Examples:
        >>> compare(lambda: 1.0, lambda: 1.5, threshold=1.02).ratio
        1.5
    """
    ways = (first, second)
    seconds: tuple[list[float], list[float]] = ([], [])
    while True:
        turns = len(seconds[0])
        for i in (0, 1) if turns % 2 == 0 else (1, 0):
            seconds[i].append(ways[i]())
        log, error = _compared(seconds[1], seconds[0])
        clear = turns + 1 >= _LEAST_TURNS and abs(log - math.log(threshold)) > 2 * error
        if clear or turns + 1 >= most_turns:
            return Comparison(math.exp(log), error, turns + 1)


def _fastest(seconds: list[list[float]], running: list[int]) -> int:
    """The way whose times are lowest beside the others' in the same turns."""
    turns = range(min(len(seconds[i]) for i in running))
    logs = {i: [math.log(seconds[i][t]) for t in turns] for i in running}
    usual = [statistics.fmean(logs[i][t] for i in running) for t in turns]
    return min(running, key=lambda i: statistics.median([logs[i][t] - usual[t] for t in turns] or [0.0]))


def _compared(times: list[float], fastest: list[float]) -> tuple[float, float]:
    """The logarithm of how much longer one takes than the other, and its standard error."""
    if times is fastest:
        return 0.0, 0.0
    logs = [math.log(a / b) for a, b in zip(times, fastest, strict=False)]
    if not logs:
        return 0.0, math.inf
    # 1.253 is how much wider the median of a normal sample scatters than its mean.
    error = 1.253 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return statistics.median(logs), error


def _clearly_slower(times: list[float], fastest: list[float], tolerance: float) -> bool:
    if len(times) <= len(_HOPELESS):
        return all(a / b > _HOPELESS[len(times) - 1] for a, b in zip(times, fastest, strict=False))
    log, error = _compared(times, fastest)
    return log - _clear(times) * error > math.log1p(tolerance)


def _level(times: list[float], fastest: list[float], tolerance: float) -> bool:
    """True where so little could be lost by taking the one for the other that more turns are not worth it."""
    log, error = _compared(times, fastest)
    return log + _clear(times) * error <= math.log1p(2 * tolerance)


def _clear(times: list[float]) -> float:
    return _CLEAR[min(len(times) - _LEAST_TURNS, len(_CLEAR) - 1)]


def _standing(times: list[float], fastest: list[float]) -> Standing:
    if times and not math.isfinite(times[-1]):
        return Standing(math.inf, math.inf, len(times), math.inf)
    log, error = _compared(times, fastest)
    return Standing(math.expm1(log), error, len(times), statistics.median(times) if times else math.nan)
