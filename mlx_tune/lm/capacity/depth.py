"""The memory of a step of a deep model, from the same step of models with fewer of the same blocks.

A step's operations come in classes: those of one name that make arrays of one shape. While blocks are added, the most
memory alive at an operation of a class grows by about the same bytes for each block, as parameters, states and what is
kept for the backward pass do. So the classes of two short models say what those of the deep one hold, and the highest
of them is its peak. The order in which MLX evaluates a graph shifts a little with depth; one trace of the deep model
itself says by how much, and everything that is read from short ones is scaled by it. Blocks that are not trained hold
their weights and nothing else at the peak of a step, so that those that are left out are added exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from mlx_tune.measuring.floors import Floor

#: The class of the memory before the first operation.
START = "start"
_PEAK = "peak"


@dataclass(frozen=True)
class Course:
    """The memory of one step.

    Attributes:
        highest: The most bytes alive at an operation of each class, in the order in which classes first come, those
            before the step under `START`.
    """

    highest: dict[Hashable, int]

    @property
    def start_bytes(self) -> int:
        """Bytes before the step."""
        return self.highest[START]

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive."""
        return max(self.highest.values())

    @property
    def floor(self) -> Floor:
        """The peak, and the classes that it was chosen from."""
        return Floor(self.peak_bytes, list(self.highest.values()))

    def coarse(self) -> Course:
        """The start and the peak alone."""
        return Course({START: self.start_bytes, _PEAK: self.peak_bytes})


@dataclass(frozen=True)
class Depths:
    """Two short models and the deep one that they stand for.

    Attributes:
        low: Repeats of each run of blocks in the shortest model.
        high: The same in the other.
        deep: The same in the model itself.
        still_bytes: The weights of one repeat of each run that is left out of both short models: blocks that are not
            trained, which hold nothing else at the peak.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    deep: tuple[int, ...]
    still_bytes: tuple[int, ...]

    @property
    def rises(self) -> bool:
        """True where a slope is drawn through two models; blocks that are not trained only add their weights."""
        return self.low != self.high

    def extended(self, low: Course, high: Course) -> Course:
        """The deep model's course from those of the short ones."""
        if low.highest.keys() != high.highest.keys():
            low, high = low.coarse(), high.coarse()
        rising = [b - a for a, b in zip(self.low, self.high, strict=True)]
        missing = [c - a for a, c in zip(self.low, self.deep, strict=True)]
        still = sum(n * more for n, more, rise in zip(self.still_bytes, missing, rising, strict=True) if not rise)
        steps = [more / rise for more, rise in zip(missing, rising, strict=True) if rise]
        times = steps[0] if steps else 0.0
        return Course({key: round(n + times * (high.highest[key] - n)) + still for key, n in low.highest.items()})


#: The course of a step of the model in which each run of blocks comes so often, at so many rows of some length.
Trace = Callable[[Sequence[int], int, int], Course]


class DeepCourse:
    """Courses of a deep model's step at several sizes of its batch.

    Args:
        depths: The short models.
        trace: The course of a model with so many repeats, at so many rows of some length.
        rows: Rows at which the deep model itself is traced where a slope is drawn.
        length: Their length.

    Attributes:
        extrapolated: True where sizes are read off a slope.
    """

    def __init__(self, depths: Depths, trace: Trace, rows: int, length: int) -> None:
        self._depths, self._trace = depths, trace
        self._read: dict[tuple[int, int], Course] = {}
        self.extrapolated = depths.rises
        self._scale = 1.0
        if self.extrapolated:
            deep, near = trace(depths.deep, rows, length), self._extended(rows, length)
            made = near.peak_bytes - near.start_bytes
            self._scale = (deep.peak_bytes - deep.start_bytes) / made if made > 0 else 1.0
            self._read[rows, length] = self._scaled(near)

    def __call__(self, rows: int, length: int) -> Course:
        """The course at so many rows of some length."""
        if (rows, length) not in self._read:
            self._read[rows, length] = self._scaled(self._extended(rows, length))
        return self._read[rows, length]

    def _extended(self, rows: int, length: int) -> Course:
        low = self._trace(self._depths.low, rows, length)
        high = self._trace(self._depths.high, rows, length) if self._depths.rises else low
        return self._depths.extended(low, high)

    def _scaled(self, course: Course) -> Course:
        start = course.start_bytes
        return Course({key: start + round(self._scale * (n - start)) for key, n in course.highest.items()})
