"""Which batch sizes and choices of blocks are worth running, from estimates and a line through two measured steps.

Pure numbers: the floor of a size and a choice is asked for, times are given.
"""

from __future__ import annotations

from collections.abc import Sequence
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
