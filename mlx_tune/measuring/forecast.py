"""The memory that a step needs at each batch size according to its graph, before anything is run."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import TypeVar

from mlx_tune.devices import backend
from mlx_tune.measuring.floors import Floor, pieces

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
#: A reading that was foreseen vouches for sizes up to so many times its own.
_VOUCHED = 1.125

#: How far an estimate may be below the truth. The measured figures are in docs/measurements/estimates.md.
ESTIMATE_MARGIN = 0.03

T = TypeVar("T")


def timing_margin() -> float:
    """The most that a peak may lie above the expected one here, as a share of what the step adds: not at all on a CPU.

    A GPU gives buffers back when it is done with them, and chooses kernels by the size, so that the same step's peak
    was up to 3 % above what smaller batches foretold (docs/measurements/gpu.md).
    """
    return 0.0 if backend() == "cpu" else ESTIMATE_MARGIN


class Forecast:
    """The floor that the graph gives at a few sizes, and straight pieces between and beyond.

    Attributes:
        knots: Size to bytes, where the graph was looked at, and where two looks say that the floor bends.

    Examples:
        >>> forecast = Forecast(lambda n: Floor(1000 + 10 * n), range(1, 500), 3000)
        >>> forecast(200), sorted(forecast.knots)
        (3000.0, [1, 8, 64, 200])
        >>> forecast.look(77)  # it is straight already
        False
    """

    def __init__(
        self,
        estimate: Callable[[int], Floor],
        sizes: Sequence[int],
        budget_bytes: float,
        known: dict[int, Floor] | None = None,
    ) -> None:
        """Look at the smallest size, unless one is known, and at ever larger ones up to where the budget is crossed."""
        self._looked = dict(known or {})
        self._estimate: Callable[[int], Floor] | None = estimate
        self._sizes, self._drawn, self._sure_to, self._wrong = sizes, False, 0, False
        self._draw()
        if not self._looked:
            self.look(sizes[0])
        for _ in range(_LOOKS):
            largest = max(self._looked)
            if self._looked[largest].bytes > budget_bytes:
                crossing = bisect_right(sizes, budget_bytes, key=self) - 1
                if crossing < 0 or self._near(sizes[crossing], budget_bytes) or not self.look(sizes[crossing]):
                    return
                continue
            if self._near(largest, budget_bytes) or largest == sizes[-1]:
                return
            position = bisect_left(sizes, largest)
            reach = len(sizes) - 1
            if not self._drawn or self._wrong:
                reach = bisect_right(sizes, _STRIDE * largest) - 1
            goal = bisect_right(sizes, budget_bytes, hi=reach + 1, key=self) - 1 if len(self._looked) > 1 else reach
            if not self.look(sizes[max(goal, position + 1)]) or self.flat:
                return

    @classmethod
    def of_knots(cls, knots: dict[int, int]) -> Forecast:
        """A forecast of what was read elsewhere, which cannot look at more."""
        self = cls.__new__(cls)
        self._looked = {size: Floor(needed) for size, needed in knots.items()}
        self._estimate, self._sizes, self._drawn, self._sure_to, self._wrong = None, sorted(knots), False, 0, False
        self._draw()
        return self

    def __call__(self, size: int) -> float:
        """Bytes expected at a size."""
        sizes = self._order
        if len(sizes) == 1:
            return float(self.knots[sizes[0]])
        right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        a, b = sizes[right - 1], sizes[right]
        return self.knots[a] + (size - a) / (b - a) * (self.knots[b] - self.knots[a])

    def look(self, size: int) -> bool:
        """Look at the graph of one more size; False where that would say nothing new, or the graph is out of reach."""
        if size in self._looked or self._estimate is None or size <= self._sure_to:
            return False
        if min(self._looked, default=size) < size < max(self._looked, default=size) and self._straight:
            return False
        foreseen = self(size) if self._drawn else None
        seen = self._looked[size] = self._estimate(size)
        if foreseen is not None and abs(seen.bytes - foreseen) > _STRAIGHT * seen.bytes:
            self._sure_to, self._wrong = 0, True  # other operations run at some sizes: from now on each is looked at
        elif foreseen is not None and not self._wrong:
            following = min(bisect_right(self._sizes, size), len(self._sizes) - 1)
            self._sure_to = max(int(_VOUCHED * size), self._sizes[following], max(self._looked))
        self._draw()
        return True

    def _draw(self) -> None:
        """Put the knots where the floor was read, and where it bends between two readings and beyond the last two."""
        sizes = sorted(self._looked)
        self.knots = {size: self._looked[size].bytes for size in sizes}
        for a, b in itertools.pairwise(sizes):
            beyond = b == sizes[-1]
            found = pieces((a, self._looked[a]), (b, self._looked[b]), self._sizes[-1] if beyond else b)
            self._drawn = found is not None
            self.knots |= {size: needed for size, needed in (found or {}).items() if size not in self._looked}
        self._order = sorted(self.knots)

    @property
    def flat(self) -> bool:
        """True where the largest readings are all the same, so that not even the batch grows any more.

        Sizes close to each other say nothing: GPUs hold whole pages.
        """
        last = sorted(self._looked)[-3:]
        return len(last) > 2 and last[-1] >= 2 * last[0] and len({self._looked[n].bytes for n in last}) == 1

    @property
    def _straight(self) -> bool:
        """True where three readings or more, the middle ones well apart from the ends, lie on one line."""
        sizes = sorted(self._looked)
        if len(sizes) < 3:
            return False
        a, b = sizes[0], sizes[-1]
        slope = (self.knots[b] - self.knots[a]) / (b - a)
        inner = [n for n in sizes if 10 * min(n - a, b - n) >= b - a]
        off = [abs(self.knots[a] + slope * (n - a) - self.knots[n]) for n in sizes]
        return bool(inner) and max(off) <= _STRAIGHT * self.knots[a]

    def _near(self, size: int, budget_bytes: float) -> bool:
        return size in self._looked and abs(self._looked[size].bytes - budget_bytes) <= _CLOSE * budget_bytes


def read_ahead(
    estimate: Callable[[int], Floor], warm: Callable[[int, int], bool], sizes: Sequence[int], budget_bytes: int
) -> Forecast:
    """The forecast, after the first step of all; or only the smallest size's floor, if that is above the budget.

    Args:
        estimate: The floor of a step at a size, from its graph.
        warm: Takes the first step at a size, of which it is told the most bytes at its floor; whether that made state
            which the estimate had not foreseen.
        sizes: Possible answers, ascending.
        budget_bytes: The limit of a peak.
    """
    # Steps of a single row often run other operations than those of several, and so say less of them.
    first = sizes[bisect_right(sizes, _STRIDE * sizes[0]) - 1]
    known = {first: estimate(first)}
    if known[first].bytes > budget_bytes and first > sizes[0]:
        first = sizes[0]
        known[first] = estimate(first)
    if known[first].bytes > budget_bytes:
        return Forecast.of_knots({first: known[first].bytes})
    if warm(sizes[0], known[first].bytes):
        known = {first: estimate(first)}
    if known[first].bytes > budget_bytes / _STRIDE and sizes[0] not in known:  # another stride would go far beyond it
        known[sizes[0]] = estimate(sizes[0])
    return Forecast(estimate, sizes, budget_bytes, known)


def cheapest_fitting(choices: Sequence[T], floor: Callable[[T], int], limit_bytes: int) -> int | None:
    """Bisect choices that need less and less memory for the first one that fits.

    Args:
        choices: From the fastest to the leanest.
        floor: The estimated floor of the whole step under a choice.
        limit_bytes: The limit.

    Returns:
        The index of the first that fits; None where the leanest does not.
    """
    if floor(choices[-1]) > limit_bytes:
        return None
    low, high = 0, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        if floor(choices[middle]) <= limit_bytes:
            high = middle
        else:
            low = middle + 1
    return high


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
