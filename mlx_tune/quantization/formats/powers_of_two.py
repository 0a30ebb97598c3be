"""Powers of two to work in, so that squares of very large and very small weights stay within float32."""

from __future__ import annotations

import mlx.core as mx

from mlx_tune.units import number

#: The bits of a float32 that hold its exponent.
_EXPONENT = 0x7F800000

#: Magnitudes whose sums of squares float32 holds with room to spare.
_PLAIN_LEAST, _PLAIN_MOST = 2.0**-40, 2.0**40

#: Where units end: 1 over them is a normal float32 as well.
_LEAST_UNIT, _MOST_UNIT = 2.0**-126, 2.0**126


def unit_of(largest: mx.array) -> mx.array:
    """The power of two just below a magnitude: to divide by it, and to multiply by it again, rounds nothing.

    Args:
        largest: Magnitudes, float32, none negative.

    Returns:
        float32 of the same shape, from 2**-126 to 2**126.

    Examples:
        >>> unit_of(mx.array([0.0, 1.0, 3.0, 1e20])).tolist()[1:3]
        [1.0, 2.0]
    """
    exponents = mx.bitwise_and(largest.view(mx.uint32), mx.array(_EXPONENT, mx.uint32))
    return mx.clip(exponents.view(mx.float32), _LEAST_UNIT, _MOST_UNIT)


def largest_magnitude(weight: mx.array) -> float:
    """The largest of a weight's magnitudes, without a copy of it.

    Examples:
        >>> largest_magnitude(mx.array([1.0, -3.0]))
        3.0
    """
    return number(mx.maximum(weight.max(), -weight.min()).astype(mx.float32))


def in_range(weight: mx.array) -> tuple[mx.array, mx.array]:
    """A weight over a power of two, where squares of it would leave float32's range; and that power, in its dtype.

    Args:
        weight: In any float dtype.

    Returns:
        The weight as it is and 1, for all but very large and very small ones.

    Examples:
        >>> weight, unit = in_range(mx.full((2, 2), 2.0**70))
        >>> weight.max().item(), unit.item() == 2.0**70
        (1.0, True)
    """
    largest = largest_magnitude(weight)
    if largest == 0 or _PLAIN_LEAST <= largest <= _PLAIN_MOST:
        return weight, mx.array(1.0, dtype=weight.dtype)
    unit = unit_of(mx.array(largest)).astype(weight.dtype)
    return weight / unit, unit
