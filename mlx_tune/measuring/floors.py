"""The floor of a step at a batch size, read off its graph, and what two floors say of the sizes around them.

Between two batch sizes the same operations run, on arrays of which each grows in a straight line. What is alive at
each operation does so, too, and the floor is the highest of these lines: two readings give all its bends.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

#: The last straight piece is drawn to so many times the larger size, as far as sizes go.
_FAR = 1024


@dataclass(frozen=True)
class Floor:
    """The floor of a step at one batch size.

    Attributes:
        bytes: The least that the step can peak at.
        live: The most bytes alive before the step and during each of its operations, of which `bytes` is the highest;
            empty where that is not known.
    """

    bytes: int
    live: Sequence[int] = ()


def pieces(low: tuple[int, Floor], high: tuple[int, Floor], last: int) -> dict[int, int] | None:
    """The bends of a floor from one size on, from what is alive at each operation at two sizes.

    Args:
        low: The smaller size and its floor.
        high: The larger.
        last: The size up to which they are wanted.

    Returns:
        Bytes at the sizes next to each bend, and at `last` at the latest at 1024 times the larger size; straight lines
        between them are the floor. None where the two did not run the same operations, or nothing grows.

    Examples:
        >>> small, large = Floor(100, [100, 20]), Floor(110, [110, 100])  # after 64 / 7 rows more the second is higher
        >>> pieces((1, small), (9, large), 21)
        {10: 112, 11: 120, 21: 220}
    """
    (a, one), (b, two) = low, high
    if not one.live or len(one.live) != len(two.live):
        return None
    lines = {(y - x, x) for x, y in zip(one.live, two.live, strict=True)}  # the rise from a to b, and where it starts
    hull = _highest(sorted(lines))
    if hull[-1][0] <= 0:
        return None

    def at(size: int) -> int:
        return ceil(max(start + rise * (size - a) / (b - a) for rise, start in hull))

    end = min(last, _FAR * max(b, 1))
    bends = [a + (b - a) * (p[1] - q[1]) / (q[0] - p[0]) for p, q in itertools.pairwise(hull)]
    near = {size for bend in bends if a < bend < end for size in (int(bend), int(bend) + 1)}
    return {size: at(size) for size in sorted(near | {end}) if a < size <= end}


def _highest(lines: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of lines by rise and start, those that are the highest somewhere right of the start, the flattest first."""
    hull: list[tuple[int, int]] = []
    for rise, start in lines:
        while hull and hull[-1][1] <= start:
            hull.pop()  # lower from the start on, and no steeper
        while len(hull) > 1:
            (r, s), (rr, ss) = hull[-1], hull[-2]
            # The new line passes the second but one before the last one does: the last is never the highest.
            if (ss - start) * (r - rr) > (ss - s) * (rise - rr):
                break
            hull.pop()
        hull.append((rise, start))
    return hull
