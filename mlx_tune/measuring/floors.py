"""The floor of a step at a batch size, read off its graph, and what two floors say of the sizes around them.

Between two batch sizes the same operations run, on arrays of which each grows in a straight line. What is alive at
each operation does so, too, and the floor is the highest of these lines: two readings give all its bends.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from mlx_tune.trees import nbytes_of

#: State that the first trace foresaw to within this share of the floor needs no second one.
_FORESEEN = 0.003
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


class StepFloor:
    """The floor of one step as a function of the batch size, from a trace of the step at that size.

    Memory that the process holds besides counts, too: a trial's peak includes it.

    Args:
        step: Runs one training step on a batch.
        make_batch: Makes a batch of n rows.
        state: Objects that the step updates.
    """

    def __init__(self, step: Callable[..., object], make_batch: Callable[[int], object], state: object) -> None:
        """Keep the step; nothing is traced yet."""
        self.step, self.make_batch, self.state = step, make_batch, state
        self._state_bytes = self._floor_bytes = 0  # by the last trace

    def __call__(self, size: int) -> Floor:
        """Trace the step at a size.

        Raises:
            TraceError: The step cannot be described without running it.
        """
        import mlx.core as mx

        from mlx_tune.graphs.estimate import follow_step

        gc.collect()
        held = mx.get_active_memory()
        batch = self.make_batch(size)
        own = nbytes_of(batch)
        graph, course = follow_step(self.step, (batch,), self.state)
        # State that a first step has yet to make is in the graph already, and will be beside the rest as well.
        of_state = [graph.values[i] for i in graph.inputs() if graph.values[i].role not in ("batch", "captured")]
        self._state_bytes = sum(value.nbytes for value in of_state)
        to_come = max(0, self._state_bytes - nbytes_of(self.state))
        besides = max(0, held + to_come - (course.start_bytes - own))
        live = [course.start_bytes, *course.live]
        self._floor_bytes = course.peak_bytes + besides
        return Floor(self._floor_bytes, [bytes_ + besides for bytes_ in live])

    @property
    def stale(self) -> bool:
        """True where the state is not what the last trace reckoned with, so that it has to be traced again."""
        return abs(nbytes_of(self.state) - self._state_bytes) > _FORESEEN * self._floor_bytes


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
