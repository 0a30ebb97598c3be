"""The memory that a step needs at each batch size according to its graph, before anything is run."""

from __future__ import annotations

import gc
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any

#: A look at the graph goes at most so many times as far as the one before. The floor of small batches may stand still
#: (the optimizer's update needs more than they do), and a line through it would cross the budget at a size whose batch
#: alone is enormous.
_STRIDE = 8
#: Looks by which the crossing of the budget is found; a straight floor takes two.
_LOOKS = 8
#: An estimate this close to the budget has found the crossing.
_CLOSE = 0.03
#: Knots this close to the line from the first to the last, as a share of them, need no more between them.
_STRAIGHT = 0.003


class Forecast:
    """The floor that the graph gives at a few sizes, and straight lines between and beyond.

    Attributes:
        knots: Size to bytes, where the graph was looked at.

    Examples:
        >>> forecast = Forecast(lambda n: 1000 + 10 * n, range(1, 500), 3000)
        >>> forecast(200), sorted(forecast.knots)
        (3000.0, [1, 8, 64, 200])
        >>> forecast.look(77)  # it is straight already
        False
    """

    def __init__(
        self,
        estimate: Callable[[int], int],
        sizes: Sequence[int],
        budget_bytes: float,
        known: dict[int, int] | None = None,
    ) -> None:
        """Look at the smallest size, and at ever larger ones up to where the budget is crossed."""
        self.knots: dict[int, int] = dict(known or {})
        self._estimate: Callable[[int], int] | None = estimate
        self.look(sizes[0])
        for _ in range(_LOOKS):
            largest = max(self.knots)
            if self.knots[largest] > budget_bytes:
                crossing = bisect_right(sizes, budget_bytes, key=self) - 1
                if crossing < 0 or self._near(sizes[crossing], budget_bytes) or not self.look(sizes[crossing]):
                    return
                continue
            if self._near(largest, budget_bytes) or largest == sizes[-1]:
                return
            position = bisect_left(sizes, largest)
            reach = bisect_right(sizes, _STRIDE * largest) - 1
            goal = bisect_right(sizes, budget_bytes, hi=reach + 1, key=self) - 1 if len(self.knots) > 1 else reach
            self.look(sizes[max(goal, position + 1)])
            if self.flat:
                return

    @classmethod
    def of_knots(cls, knots: dict[int, int]) -> Forecast:
        """A forecast of what was read elsewhere, which cannot look at more."""
        self = cls.__new__(cls)
        self.knots, self._estimate = dict(knots), None
        return self

    def __call__(self, size: int) -> float:
        """Bytes expected at a size."""
        sizes = sorted(self.knots)
        if len(sizes) == 1:
            return float(self.knots[sizes[0]])
        right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        a, b = sizes[right - 1], sizes[right]
        return self.knots[a] + (size - a) / (b - a) * (self.knots[b] - self.knots[a])

    def look(self, size: int) -> bool:
        """Look at the graph of one more size; False where that would say nothing new, or the graph is out of reach."""
        if size in self.knots or self._estimate is None:
            return False
        if min(self.knots, default=size) < size < max(self.knots, default=size) and self._straight:
            return False
        self.knots[size] = self._estimate(size)
        return True

    @property
    def flat(self) -> bool:
        """True where the largest knots are all the same, so that not even the batch grows any more."""
        return len(self.knots) > 2 and len({self.knots[n] for n in sorted(self.knots)[-3:]}) == 1

    @property
    def _straight(self) -> bool:
        """True where three knots or more, the middle ones well apart from the ends, lie on one line."""
        sizes = sorted(self.knots)
        if len(sizes) < 3:
            return False
        a, b = sizes[0], sizes[-1]
        slope = (self.knots[b] - self.knots[a]) / (b - a)
        inner = [n for n in sizes if 10 * min(n - a, b - n) >= b - a]
        off = [abs(self.knots[a] + slope * (n - a) - self.knots[n]) for n in sizes]
        return bool(inner) and max(off) <= _STRAIGHT * self.knots[a]

    def _near(self, size: int, budget_bytes: float) -> bool:
        return size in self.knots and abs(self.knots[size] - budget_bytes) <= _CLOSE * budget_bytes


def read_ahead(
    estimate: Callable[[int], int], warm: Callable[[int], bool], sizes: Sequence[int], budget_bytes: int
) -> Forecast:
    """The forecast, after the first step of all; or only the smallest size's floor, if that is above the budget.

    Args:
        estimate: The floor of a step at a size, from its graph.
        warm: Takes the first step at a size; whether that made the optimizer's state, so that steps now need more.
        sizes: Possible answers, ascending.
        budget_bytes: The limit of a peak.
    """
    known = {sizes[0]: estimate(sizes[0])}
    if known[sizes[0]] > budget_bytes:
        return Forecast.of_knots(known)
    made = warm(sizes[0])
    return Forecast(estimate, sizes, budget_bytes, None if made else known)


def floor_of(step: Callable[..., Any], make_batch: Callable[[int], Any], state: Any) -> Callable[[int], int]:
    """The estimate of one step's floor as a function of the batch size.

    Memory that the process holds besides counts, too: a trial's peak includes it.

    Raises:
        TraceError: From the returned function, for a step that cannot be described without running it.
    """

    def estimate(size: int) -> int:
        import mlx.core as mx

        from mlx_tune.graphs.estimate import follow_step
        from mlx_tune.trees import arrays_of

        gc.collect()
        held = mx.get_active_memory()
        batch = make_batch(size)
        own = sum(array.nbytes for array in {id(array): array for array in arrays_of(batch)}.values())
        _, course = follow_step(step, (batch,), state)
        return course.peak_bytes + max(0, held - (course.start_bytes - own))

    return estimate
