"""Runs of equal blocks in a model, and which blocks a shorter model of the same kind has."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

#: A pattern of more blocks than this is not looked for.
_LONGEST_PATTERN = 12


@dataclass(frozen=True)
class Run:
    """A pattern of blocks, several times in a row.

    Attributes:
        start: The first block.
        period: Blocks in the pattern.
        repeats: The number of times that it comes.
    """

    start: int
    period: int
    repeats: int


def find_runs(kinds: Sequence[Hashable], least: int) -> tuple[Run, ...]:
    """Find patterns that repeat, those that leave out the most blocks first, and return them in order.

    Args:
        kinds: The kind of each block; blocks of the same kind are equal.
        least: Repeats that a shorter model keeps of each.

    Returns:
        Runs that do not overlap, each of more than `least` repeats.

    Examples:
        >>> find_runs("abbbbbb", least=2)
        (Run(start=1, period=1, repeats=6),)
        >>> find_runs("aabaabaabaab", least=2)
        (Run(start=0, period=3, repeats=4),)
    """
    best, saved = None, 0
    for period in range(1, min(_LONGEST_PATTERN, len(kinds)) + 1):
        start = 0
        while start + period <= len(kinds):
            repeats = _repeats(kinds, start, period)
            if (repeats - least) * period > saved:
                best, saved = Run(start, period, repeats), (repeats - least) * period
            start += max(1, (repeats - 1) * period)
    if best is None:
        return ()
    end = best.start + best.period * best.repeats
    before = find_runs(kinds[: best.start], least)
    after = find_runs(kinds[end:], least)
    return (*before, best, *(Run(end + run.start, run.period, run.repeats) for run in after))


def _repeats(kinds: Sequence[Hashable], start: int, period: int) -> int:
    end = start + period
    while end < len(kinds) and kinds[end] == kinds[end - period]:
        end += 1
    return (end - start) // period


def kept_blocks(count: int, runs: Sequence[Run], repeats: Sequence[int]) -> tuple[int, ...]:
    """The blocks of a model of which each run comes only so often: the first repeats of it.

    Args:
        count: Blocks of the whole model.
        runs: Its runs.
        repeats: The number of times that each of them is to come, at most as often as it does.

    Examples:
        >>> kept_blocks(7, [Run(1, 1, 6)], [2])
        (0, 1, 2)
    """
    left_out: set[int] = set()
    for run, times in zip(runs, repeats, strict=True):
        left_out |= set(range(run.start + run.period * times, run.start + run.period * run.repeats))
    return tuple(i for i in range(count) if i not in left_out)
