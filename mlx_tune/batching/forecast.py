"""What a step needs at each batch size according to its graph, before anything is run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

#: How often the crossing of the budget is looked for again; the estimate is almost straight, so twice is plenty.
_ROUNDS = 2


class Forecast:
    """The floor that the graph gives at a few sizes, and straight lines between.

    Attributes:
        knots: Size to bytes, where the graph was looked at.

    Examples:
        >>> forecast = Forecast(lambda n: 1000 + 10 * n, range(1, 500), 3000)
        >>> forecast(200), sorted(forecast.knots)
        (3000.0, [1, 2, 200, 201])
    """

    def __init__(self, estimate: Callable[[int], int], sizes: Sequence[int], budget_bytes: int) -> None:
        """Look at the two smallest sizes, and on both sides of where the line crosses the budget."""
        self.knots: dict[int, int] = {}
        for size in sizes[:2]:
            self.knots[size] = estimate(size)
        for _ in range(_ROUNDS if len(sizes) > 2 else 0):
            low, high = 0, len(sizes)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self(sizes[middle]) <= budget_bytes else (low, middle)
            if self(sizes[1]) <= self(sizes[0]):
                return  # it does not grow: there is no crossing
            for size in sizes[low : low + 2]:
                if size not in self.knots:
                    self.knots[size] = estimate(size)

    def __call__(self, size: int) -> float:
        """Bytes expected at a size."""
        sizes = sorted(self.knots)
        if len(sizes) == 1:
            return float(self.knots[sizes[0]])
        right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        a, b = sizes[right - 1], sizes[right]
        return self.knots[a] + (size - a) / (b - a) * (self.knots[b] - self.knots[a])


def floor_of(step: Callable[[Any], Any], make_batch: Callable[[int], Any], state: Any) -> Callable[[int], int]:
    """The estimate of one step's floor as a function of the batch size.

    Raises:
        TraceError: From the returned function, for a step that cannot be described without running it.
    """

    def estimate(size: int) -> int:
        from mlx_tune.graphs import estimate_memory

        return estimate_memory(step, make_batch(size), state=state).floor_bytes

    return estimate
