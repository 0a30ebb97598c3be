"""The choices worth making: those that no other one beats in both of two things."""

from __future__ import annotations

from collections.abc import Sequence


def unbeaten(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other one beats in both of their numbers, of which less is better.

    Args:
        points: Pairs of numbers, such as bytes and seconds; of a rate, its negative. Of equal ones the first is kept.

    Returns:
        Their positions, by the first number, rising.

    Examples:
        >>> unbeaten([(30, 2.0), (10, 3.0), (20, 1.0)])
        [1, 2]
    """
    kept: list[int] = []
    for i in sorted(range(len(points)), key=points.__getitem__):
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept
