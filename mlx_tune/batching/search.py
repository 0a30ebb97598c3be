"""The search for the largest size that fits, over numbers alone: nothing here knows of models or devices.

Sizes are approached from below. Peaks grow almost linearly with the batch, or with what a model of the step says (its
shape), so the peaks measured so far say how far the next step may reach. Where they do not lie on a line (paddings,
other kernels from some size on), the line is only a hint, and the bracket between the largest size that fitted and
the smallest that did not is narrowed until it closes. A size whose predicted peak is above the budget is not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: Slopes that differ by less than this factor are taken for one line, and then a size may be ruled out unmeasured.
_SAME_LINE = 1.25
#: How far beyond the largest known size a first leap may go, while no line is established.
_LEAP = 16
#: How far it may go where even that is more than is known to be safe: searches must end.
_LEAST_LEAP = 1.5
#: By how much a single peak may scatter, as a share of it.
_NOISE = 0.02
#: By how much a shape may be too steep or too flat, before measurements say more.
_DOUBT = 0.1
#: A leap goes all the way where the error of what is foreseen there is at most this share of the budget.
_SURE = 0.025


@dataclass(frozen=True)
class SizeMeasurement:
    """The outcome of one measurement at one size.

    Attributes:
        fits: True where the size fits the budget.
        bytes: The peak, or None where the trial died before it could be read.
        base_bytes: The part of it that was there before and does not grow with the size, where that is known.
    """

    fits: bool
    bytes: int | None
    base_bytes: int | None = None


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        size: The largest size that fits, or None if not even the smallest does.
        next_size: The size after it, or None where there is none to try.
        next_bytes: The peak of `next_size`, measured or predicted; None if it is not known.
        next_measured: True where `next_size` was ruled out by a measurement; else it was by prediction.
    """

    size: int | None
    next_size: int | None = None
    next_bytes: int | None = None
    next_measured: bool = False


#: Takes a size and its predicted peak (None where nothing is known yet) and measures it.
Measure = Callable[[int, int | None], SizeMeasurement]


def search(
    measure: Measure,
    sizes: Sequence[int],
    budget_bytes: int,
    *,
    shape: Callable[[int], float] | None = None,
    look: Callable[[int], bool] | None = None,
    start: int = 0,
    margin: float = 0.0,
) -> Found:
    """Find the largest of `sizes` that fits.

    Without a `shape`, the answer on curves that never fall is the one that trying every size would give; on straight
    ones it takes four measurements. With one it takes three, and the answer is as exact as the shape: a size that the
    line through the measured peaks puts above the budget is not tried.

    Args:
        measure: Measures one size; called at most once for each.
        sizes: Possible answers, ascending. A `range` will do, however long.
        budget_bytes: The limit of a peak.
        shape: Bytes that are expected at a size, from a model of the step. Only its differences count: the
            measured peaks say where it lies and how steep it is. It is trusted while they agree with it.
        look: Makes `shape` exact at a size; False where it was already. Called for each size before it is measured
            or ruled out, so that between those a shape may be cheap and rough.
        start: The position in `sizes` to begin at, where more than the smallest is known to be harmless.
        margin: The most that a peak may lie above what is expected of a size, as a share of what the step adds to
            what was there before. A size that would be above the budget by it is not measured.

    Returns:
        The answer, and how the size above it was ruled out.

    Examples:
        >>> measure = lambda n, predicted: SizeMeasurement(100 + 7 * n <= 1000, 100 + 7 * n)
        >>> found = search(measure, range(1, 10**6), 1000)
        >>> found.size, found.next_size, found.next_bytes
        (128, 129, 1003)
    """
    curve = _Curve(budget_bytes, shape, margin)
    low, high = -1, len(sizes)  # positions: the largest that fitted, the smallest that did not
    stalled = 0
    first = min(max(start, 0), len(sizes) - 1)

    def exact(position: int) -> bool:
        """True where the shape is exact there already; if not, it is now, and what was decided by it is open again."""
        return look is None or not look(sizes[position])

    while True:
        position = first if (low, high) == (-1, len(sizes)) else _next_position(curve, sizes, low, high, stalled)
        if position is None:
            if 0 <= low < high - 1 and not exact(low + 1):
                continue
            return _answer(curve, sizes, low, high)
        if not exact(position):
            continue
        size, width = sizes[position], high - low
        predicted = curve.predict(size) if low >= 0 else None
        measured = measure(size, predicted)
        curve.compare(size, measured.bytes)
        if measured.fits:
            curve.add(size, measured.bytes)
            curve.base = measured.base_bytes
            crept = position - low == 1 and position > 1  # the first step of one is how the slope is learned
            slow = 2 * (high - position) > width and high < len(sizes)
            stalled = stalled + 1 if crept or slow else 0
            low = position
        else:
            if measured.bytes is not None:
                curve.above[size] = measured.bytes
            stalled = stalled + 1 if 2 * (position - low) > width else 0
            high = position


@dataclass
class _Curve:
    """The peaks known so far, and what they say of others."""

    budget: int
    shape: Callable[[int], float] | None
    margin: float = 0.0
    fitting: list[tuple[int, int]] = field(default_factory=list)  # size and peak, ascending
    above: dict[int, int] = field(default_factory=dict)
    scatter: float = 0.0  # how far peaks were from what three points foretold
    base: int | None = None  # what was held before the largest size that fits, where that is known

    def add(self, size: int, peak: int | None) -> None:
        """Note the peak of a size that fits. Sizes come in ascending order: only larger ones are still of interest."""
        if peak is not None:
            self.fitting.append((size, peak))

    def x(self, size: int) -> float:
        """Where a size lies on the axis on which peaks are expected to be straight."""
        return float(size) if self.shape is None else self.shape(size)

    def _slope(self, a: tuple[int, int], b: tuple[int, int]) -> float:
        run = self.x(b[0]) - self.x(a[0])
        return max(0.0, (b[1] - a[1]) / run) if run > 0 else 0.0

    def _neighbours(self) -> list[float]:
        """Slopes between neighbouring points."""
        return [self._slope(a, b) for a, b in zip(self.fitting, self.fitting[1:], strict=False)]

    @property
    def straight(self) -> bool:
        """True where the points lie on one line, so that it can be trusted beyond them."""
        slopes = self._neighbours()
        return len(slopes) >= 2 and 0 < max(slopes) <= _SAME_LINE * min(slopes)

    @property
    def shaped(self) -> bool:
        """True where the points agree with the shape, so that it can be trusted between and beyond them."""
        if self.shape is None or not self.fitting:
            return False
        for a, b in zip(self.fitting, self.fitting[1:], strict=False):
            rise, foreseen, noise = b[1] - a[1], self.x(b[0]) - self.x(a[0]), _NOISE * b[1]
            if not foreseen / _SAME_LINE - noise <= rise <= foreseen * _SAME_LINE + noise:
                return False
        return True

    def _weighed(self) -> tuple[float, float]:
        """The steepness of the peaks beside the shape, and the error of that.

        Noise makes two peaks that are close together say little, and the shape is good, so they are weighed against
        each other: each counts by the inverse square of its error.
        """
        first, last = self.fitting[0], self.fitting[-1]
        run = self.x(last[0]) - self.x(first[0])
        if run <= 0:
            return 1.0, _DOUBT
        error = _NOISE * last[1] / run
        weight = _DOUBT**2 / (_DOUBT**2 + error**2)
        return 1.0 + weight * (self._slope(first, last) - 1.0), weight**0.5 * error

    @property
    def sure(self) -> bool:
        """True where the points agree with the shape, and say what will be at the budget closely enough to go there."""
        if not self.shaped:
            return False
        slope, error = self._weighed()
        return error / slope * (self.budget - self.fitting[-1][1]) <= _SURE * self.budget

    @property
    def least_slope(self) -> float:
        """The slope below which the next sizes are not expected to go; 0 without a line to trust."""
        return min(self._neighbours()) if self.straight else 0.0

    @property
    def steep_slope(self) -> float | None:
        """The slope that leaps reckon with, taken over long distances so that noise counts little."""
        if self.shaped:
            return self._weighed()[0]
        if len(self.fitting) < 2:
            return None
        last = self.fitting[-1]
        reach = self.x(last[0]) - self.x(self.fitting[0][0])
        far = [p for p in self.fitting[:-1] if self.x(last[0]) - self.x(p[0]) >= reach / 2]
        return max(self._slope(p, last) for p in far or self.fitting[-2:-1])

    def _foreseen(self, size: int) -> float:
        """The peak that the shape and the points make of a larger size."""
        last = self.fitting[-1]
        beyond = min((n for n in self.above if n >= size), default=None)
        slope = self._weighed()[0]
        if beyond is not None and self.above[beyond] > last[1]:
            slope = self._slope(last, (beyond, self.above[beyond]))
        return last[1] + slope * (self.x(size) - self.x(last[0]))

    def compare(self, size: int, peak: int | None) -> None:
        """See how far a peak is from what was foreseen where three points or more said what to expect."""
        if peak is not None and len(self.fitting) + len(self.above) >= 3 and self.shaped:
            self.scatter = max(self.scatter, abs(peak - self._foreseen(size)))

    @property
    def hidden(self) -> bool:
        """True where something steeper than the points show may lie below them, as far as that can be told.

        Whatever grows with the size grows no faster than the size itself, so its slope is at most what the last size
        added, by its size. Where the points rise much less than that, something else makes the peak, such as the
        optimizer's update, and what the size takes is yet to be seen.
        """
        if self.base is None or self.shape is not None:
            return False
        size, peak = self.fitting[-1]
        return self.least_slope < (peak - self.base) / size / 2

    @property
    def farthest(self) -> float:
        """The farthest leap, in times the last size, while no line is established."""
        if self.base is None or self.fitting[-1][1] <= self.base:
            return _LEAP
        return max(_LEAST_LEAP, min(_LEAP, (self.budget - self.base) / (self.fitting[-1][1] - self.base)))

    def least(self, size: int) -> float:
        """The least that a larger size is expected to need room for.

        Where there is a shape, that is what is foreseen and the scatter: a size that is foreseen closer to the budget
        would be a throw of dice, and so would its neighbours, one trial after the other.
        """
        if self.shaped:
            return self._foreseen(size) + self.scatter
        last = self.fitting[-1]
        return last[1] + self.least_slope * (self.x(size) - self.x(last[0]))

    def allows(self, size: int) -> bool:
        """True where a larger size may be measured: it is expected within the budget, by the margin."""
        least = self.least(size)
        return least + self.margin * (least - (self.base or 0)) <= self.budget

    def predict(self, size: int) -> int:
        """The peak expected at a larger size; where that is uncertain, the least that it can be."""
        if not self.fitting:
            return 0
        if self.shaped:
            return round(self._foreseen(size))
        last = self.fitting[-1]
        slope = self.steep_slope
        if slope is None:
            return last[1]
        expected = last[1] + slope * (self.x(size) - self.x(last[0]))
        return round(expected if expected <= self.budget else self.least(size))


def _next_position(curve: _Curve, sizes: Sequence[int], low: int, high: int, stalled: int) -> int | None:
    """Which size to measure next, or None when the answer is known."""
    if low < 0:
        return 0 if high > 0 else None
    if high - low <= 1:
        return None
    if not curve.fitting:  # peaks could not be read: nothing but halving is left
        return low + 1 if high == len(sizes) and low == 0 else (low + high) // 2
    allowed = _last(lambda i: curve.allows(sizes[i]), low, high)
    if allowed == low:
        return None
    if stalled >= 2:  # neither the line nor the bracket has helped twice over: halve, or double where nothing failed
        halfway = (low + high) // 2 if high < len(sizes) else low + 2 ** (stalled - 1)
        if curve.hidden:
            farthest = sizes[low] * curve.farthest
            halfway = min(halfway, _last(lambda i: sizes[i] <= farthest, low, high))
        return min(max(halfway, low + 1), allowed)
    if high < len(sizes) and curve.shaped and curve.above.get(sizes[high], 0) > curve.budget:
        return allowed
    if high < len(sizes):
        return min(max(_between(curve, sizes, low, high), low + 1), allowed)
    return min(_leap(curve, sizes, low, high), allowed)


def _between(curve: _Curve, sizes: Sequence[int], low: int, high: int) -> int:
    """Interpolate between a size that fits and one that does not."""
    top = curve.above.get(sizes[high])
    last = curve.fitting[-1]
    if top is None or top <= curve.budget:  # it died, or was refused for something else
        return (low + high) // 2
    share = (curve.budget - last[1]) / (top - last[1])
    goal = curve.x(last[0]) + share * (curve.x(sizes[high]) - curve.x(last[0]))
    return min(_last(lambda i: curve.x(sizes[i]) <= goal, low, high), high - 1)


def _leap(curve: _Curve, sizes: Sequence[int], low: int, high: int) -> int:
    """The size to go to where none has failed yet."""
    slope = curve.steep_slope
    if slope is None:
        return low + 1
    size, peak = curve.fitting[-1]
    span = curve.x(size) - curve.x(curve.fitting[0][0])

    def reach(goal: float) -> int:
        return _last(lambda i: peak + slope * (curve.x(sizes[i]) - curve.x(size)) <= goal, low, high)

    target = reach(curve.budget)
    straight = len(curve.fitting) >= 3 and curve.straight
    near = len(curve.fitting) >= 2 and target > low and 0 < curve.x(sizes[target]) - curve.x(size) <= span
    if not (curve.sure or straight or near):
        target = reach(peak + (curve.budget - peak) / 2)  # on little knowledge, half of what is left
    if not curve.shaped and (curve.hidden or not (straight or near)):
        target = min(target, _last(lambda i: sizes[i] <= curve.farthest * size, low, high))
    return max(target, low + 1)


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest position in [low, high) for which `holds`, which is true up to some position; `low` if none."""
    # Gallop first: `high` may be astronomically far, and `holds` may cost something.
    step = 1
    while low + step < high and holds(low + step):
        low += step
        step *= 2
    high = min(high, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _answer(curve: _Curve, sizes: Sequence[int], low: int, high: int) -> Found:
    if low < 0:
        first = sizes[0] if len(sizes) else None
        return Found(None, first, curve.above.get(first) if first is not None else None, next_measured=True)
    if low + 1 >= len(sizes):
        return Found(sizes[low])
    following = sizes[low + 1]
    if high == low + 1:
        return Found(sizes[low], following, curve.above.get(following), next_measured=True)
    return Found(sizes[low], following, round(curve.least(following)), next_measured=False)
