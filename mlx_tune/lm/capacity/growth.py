"""The largest size of something that fits, from the memory of a step at a few sizes: pure functions over numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mlx_tune.measuring.floors import Floor
from mlx_tune.measuring.forecast import largest_fitting

#: A reading this close to its prediction needs no further one.
_CLOSE = 0.01
#: Readings beyond the first ones at most.
_MORE = 3
#: The largest size that is allowed is not read where it is predicted to leave so much of the budget.
_AMPLE = 0.7
#: An answer up to so many times the largest reading is taken without another one.
_NEAR = 4


@dataclass(frozen=True)
class Largest:
    """The answer of a search.

    Attributes:
        size: The largest that fits; 0 where none does.
        bytes: Its predicted peak; that of the smallest where none fits.
        limited: True where a larger one would fit, and was not allowed.
    """

    size: int
    bytes: int
    limited: bool = False


def largest_foretold(
    look: Callable[[int], Floor],
    budget_bytes: int,
    first: Sequence[int],
    *,
    step: int = 1,
    most: int = 1 << 20,
) -> Largest:
    """Find the largest size whose peak stays within a budget.

    Between sizes the same operations run, on arrays that grow with the size as polynomials: the memory at each kind of
    operation is one through the sizes that were looked at, and the peak is the highest of them.

    Args:
        look: The floor at a size; its `live` has the kinds of operations in their order.
        budget_bytes: The limit of peaks.
        first: Sizes to look at first, ascending: two where memory grows in a straight line, three where it curves.
        step: Sizes are multiples of this.
        most: The largest size that is allowed.

    Examples:
        >>> largest_foretold(lambda n: Floor(100 + 3 * n * n, [100 + 3 * n * n, 90]), 1000, (1, 2, 4))
        Largest(size=17, bytes=967, limited=False)
    """
    most = max(step, most // step * step)
    seen = {size: look(size) for size in dict.fromkeys(min(size, most) for size in first)}
    degree = len(seen) - 1
    sure = True
    for _ in range(_MORE):
        size = _crossing(seen, degree, budget_bytes, step, most)
        if size in seen or size == 0 or (sure and size <= _NEAR * max(seen) and _alike(seen)):
            break
        if size == most and foretell(seen, degree, size) <= _AMPLE * budget_bytes:
            break
        foreseen, seen[size] = foretell(seen, degree, size), look(size)
        sure = abs(seen[size].bytes - foreseen) <= _CLOSE * foreseen
    size = _crossing(seen, degree, budget_bytes, step, most)
    shown = foretell(seen, degree, size or step)
    return Largest(size, shown, limited=size == most)


def foretell(seen: dict[int, Floor], degree: int, size: int) -> int:
    """The peak at a size, from polynomials through the nearest sizes that were looked at."""
    if size in seen:
        return seen[size].bytes
    near = sorted(sorted(seen, key=lambda n: abs(n - size))[: degree + 1])
    shares = [_share(near, i, size) for i in range(len(near))]
    lives = [seen[n].live or [seen[n].bytes] for n in near]
    if len({len(live) for live in lives}) > 1:
        lives = [[seen[n].bytes] for n in near]
    highest: float = max(sum(s * n for s, n in zip(shares, kind, strict=True)) for kind in zip(*lives, strict=True))
    return round(highest)


def _alike(seen: dict[int, Floor]) -> bool:
    """True where the same kinds of operations ran at every size."""
    return len({len(floor.live) for floor in seen.values()}) == 1


def _share(near: Sequence[int], i: int, size: int) -> float:
    """Lagrange's weight of one point."""
    share = 1.0
    for j, other in enumerate(near):
        if j != i:
            share *= (size - other) / (near[i] - other)
    return share


def _crossing(seen: dict[int, Floor], degree: int, budget_bytes: int, step: int, most: int) -> int:
    """The largest multiple of the step that is predicted to fit, 0 where none is."""
    return largest_fitting(range(step, most + 1, step), partial(foretell, seen, degree), budget_bytes) or 0
