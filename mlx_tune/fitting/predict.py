"""Which batch sizes and choices of blocks are worth running, from estimates and a line through two measured steps.

Pure numbers: the floor of a size and a choice is asked for, times are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """The time of a step: a fixed part, a part for each row, and what is computed twice for each row.

    Attributes:
        fixed_seconds: The time of a step whatever its batch.
        row_seconds: The time that each row adds.
    """

    fixed_seconds: float
    row_seconds: float

    def seconds(self, batch_size: int, extra_row_seconds: float = 0.0) -> float:
        """One step.

        Args:
            batch_size: Its rows.
            extra_row_seconds: The time that checkpointing adds for each row.

        Examples:
            >>> Pace(0.5, 0.25).seconds(4, extra_row_seconds=0.125)
            2.0
        """
        return self.fixed_seconds + batch_size * (self.row_seconds + extra_row_seconds)


def pace_through(points: Sequence[tuple[int, float]]) -> Pace:
    """The line through measured steps: the one that leaves the least squares, neither part negative.

    Args:
        points: Batch sizes and seconds without checkpointing, at least one.

    Returns:
        The pace; through a single point, time in proportion to the batch.

    Examples:
        >>> pace_through([(2, 1.0), (6, 2.0)])
        Pace(fixed_seconds=0.5, row_seconds=0.25)
    """
    n = len(points)
    mean_size = sum(size for size, _ in points) / n
    mean_seconds = sum(seconds for _, seconds in points) / n
    spread = sum((size - mean_size) ** 2 for size, _ in points)
    if spread:
        slope = sum((size - mean_size) * (seconds - mean_seconds) for size, seconds in points) / spread
        fixed = mean_seconds - slope * mean_size
        if slope >= 0 and fixed >= 0:
            return Pace(fixed, slope)
        if slope < 0:
            return Pace(mean_seconds, 0.0)
    size_squares = sum(size * size for size, _ in points)
    return Pace(0.0, sum(size * seconds for size, seconds in points) / size_squares)


def largest_fitting(sizes: Sequence[int], floor: Callable[[int], int], limit_bytes: int) -> int | None:
    """The largest size whose floor is within the limit, with few questions where the floor is nearly a line.

    Args:
        sizes: Ascending, at least one.
        floor: The estimated floor of a size; never falls as sizes grow.
        limit_bytes: The limit.

    Returns:
        The size; None where the smallest does not fit.

    Examples:
        >>> largest_fitting(range(1, 1000), lambda n: 100 + 10 * n, 5000)
        490
    """
    low, high = 0, len(sizes) - 1
    at_low = floor(sizes[low])
    if at_low > limit_bytes:
        return None
    at_high: int | None = None
    probe = min(high, max(1, low + 1)) if high else 0
    while low < high and at_high is None:  # go up by doubling, so that no size far beyond the limit is built
        value = floor(sizes[probe])
        if value > limit_bytes:
            high, at_high = probe, value
        else:
            low, at_low = probe, value
            guess = _interpolated(sizes, floor, 0, low, limit_bytes)
            probe = min(high, max(low + 1, min(guess + 1, 8 * max(1, low))))
    if at_high is None:
        return sizes[low]
    bisect = False
    while high - low > 1:  # `low` fits, `high` does not
        share = (limit_bytes - at_low) / max(1, at_high - at_low)
        middle = (low + high) // 2 if bisect else low + int(share * (high - low))
        middle = min(high - 1, max(low + 1, middle))
        value = floor(sizes[middle])
        before = high - low
        if value <= limit_bytes:
            low, at_low = middle, value
        else:
            high, at_high = middle, value
        bisect = high - low > before / 2
    return sizes[low]


def _interpolated(sizes: Sequence[int], floor: Callable[[int], int], first: int, last: int, limit_bytes: int) -> int:
    """Where the line through two positions meets the limit."""
    rise = floor(sizes[last]) - floor(sizes[first])
    if last == first or rise <= 0:
        return 2 * last + 1
    return first + int((limit_bytes - floor(sizes[first])) / rise * (last - first))


def thinned(sizes: Sequence[int], low: int, high: int, most: int) -> list[int]:
    """Some of the sizes from `low` to `high`, spread evenly in ratio, ends included where they are sizes.

    Args:
        sizes: Ascending.
        low: The smallest to take.
        high: The largest to take.
        most: The number at most, at least 1.

    Returns:
        Ascending sizes, the largest that there is in the range always among them.

    Examples:
        >>> thinned(range(1, 100), 4, 64, 5)
        [4, 8, 16, 32, 64]
    """
    from bisect import bisect_left, bisect_right

    first, last = bisect_left(sizes, low), bisect_right(sizes, high) - 1
    if last < first:
        return []
    if most == 1 or first == last:
        return [sizes[last]]
    bottom, top = sizes[first], sizes[last]
    wanted = [bottom * (top / bottom) ** (k / (most - 1)) for k in range(most)]
    found = {sizes[min(last, max(first, bisect_right(sizes, round(w)) - 1))] for w in wanted}
    return sorted(found | {sizes[last]})
