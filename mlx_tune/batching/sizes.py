"""The batch sizes that a search may answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.measuring.ranks import Ranks
from mlx_tune.units import whole_number

#: Where neither a maximum nor a target is given, sizes end here.
_NO_MAXIMUM = 1 << 32


def agreed_sizes(
    ranks: Ranks, min_batch: int, max_batch: int | None, multiple_of: int, target_batch: int | None
) -> Sequence[int]:
    """Every size that may be answered, ascending; where ranks have different maxima, up to the smallest.

    Args:
        ranks: The processes that search together.
        min_batch: The smallest size.
        max_batch: The largest, or None.
        multiple_of: The number that every size divides by.
        target_batch: The number that every size divides, or None.

    Returns:
        At least one size.

    Raises:
        InvalidArgumentError: An argument is no whole number of at least 1, ranks were given different ones, or no size
            is left.

    Examples:
        >>> agreed_sizes(Ranks(), 4, None, 2, 36)
        (4, 6, 12, 18, 36)
    """
    given = {"min_batch": min_batch, "max_batch": max_batch, "multiple_of": multiple_of, "target_batch": target_batch}

    def check() -> dict[str, int]:
        return {name: whole_number(value, name, least=1) for name, value in given.items() if value is not None}

    own = ranks.agree(check)
    ranks.same(**{name: own.get(name) for name in given if name != "max_batch"})
    last = ranks.smallest(min(own.get("max_batch", _NO_MAXIMUM), _NO_MAXIMUM))
    return _sizes(own["min_batch"], last, own["multiple_of"], own.get("target_batch"))


def _sizes(min_batch: int, last: int, multiple_of: int, target_batch: int | None) -> Sequence[int]:
    if min_batch > last:
        raise InvalidArgumentError(f"min_batch={min_batch} is above max_batch={last}: no size lies between.")
    if target_batch is not None and target_batch > _NO_MAXIMUM:
        raise InvalidArgumentError(f"target_batch={target_batch}: an update can have {_NO_MAXIMUM:,} rows at the most.")
    first = -(-min_batch // multiple_of) * multiple_of
    sizes: Sequence[int] = range(first, last + 1, multiple_of)
    if target_batch is not None:
        small = [n for n in range(1, math.isqrt(target_batch) + 1) if target_batch % n == 0]
        divisors = sorted({*small, *(target_batch // n for n in small)})
        sizes = tuple(n for n in divisors if first <= n <= last and n % multiple_of == 0)
    if not sizes:
        upper = "" if last == _NO_MAXIMUM else f" and at most max_batch={last}"
        divides = "" if target_batch is None else f" that divides target_batch={target_batch}"
        raise InvalidArgumentError(
            f"There is no multiple of multiple_of={multiple_of}{divides}, at least min_batch={min_batch}{upper}."
        )
    return sizes
