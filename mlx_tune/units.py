"""Bytes, whole numbers, fractions, times and dtypes to text, and text back; arrays of one number to that.

Decimal units, as mlx-lm and Apple count: 1 GB is 10^9 bytes. Binary units are written with an i: 1 GiB is 2^30.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

from mlx_tune.errors import InvalidArgumentError, MlxTuneError

if TYPE_CHECKING:
    import mlx.core as mx

#: A memory budget as one may give it: bytes, text such as "24GB", a share of what is free, or None for the default.
Budget = str | SupportsIndex | float | None

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = re.compile(r"([+-]?)\s*(\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?\s*([kKmMgGtTpP]?)(i?)([bB]?)")
_ACCEPTED = 'Give a whole number of bytes, or text such as "8GB", "8G" (both 8 x 10^9), "8GiB" (8 x 2^30) or "512 MB".'


def parse_bytes(size: str | SupportsIndex | float) -> int:
    """Read a number of bytes.

    Args:
        size: A whole number of bytes, or text: a number and a unit out of B, K, KB, KiB, M, MB, MiB, G, GB, GiB,
            T, TB, TiB, P, PB, PiB, in any case, with or without a space. Without an i the unit is decimal.

    Returns:
        Bytes, rounded to the nearest whole one.

    Raises:
        InvalidArgumentError: Negative, not finite, a fraction of a byte, or not a size at all; the text repeats
            what was given.

    Examples:
        >>> parse_bytes("12.5GB"), parse_bytes("8GiB"), parse_bytes(4096)
        (12500000000, 8589934592, 4096)
    """
    if isinstance(size, str):
        return _parse_text(size)
    if isinstance(size, bool):
        raise InvalidArgumentError(f"{size!r} is not a number of bytes. {_ACCEPTED}")
    if isinstance(size, float):
        if not math.isfinite(size):
            raise InvalidArgumentError(f"{size!r} is not a number of bytes: it must be finite. {_ACCEPTED}")
        if size != int(size):
            raise InvalidArgumentError(f"{size!r} is not a whole number of bytes. {_ACCEPTED}")
        number = int(size)
    else:
        try:
            number = operator.index(size)
        except TypeError:
            raise InvalidArgumentError(f"{size!r} is not a number of bytes. {_ACCEPTED}") from None
    if number < 0:
        raise InvalidArgumentError(f"{size!r} is negative: a number of bytes cannot be. {_ACCEPTED}")
    return number


def whole_number(
    value: object, name: str, *, least: int | None = None, error: type[MlxTuneError] = InvalidArgumentError
) -> int:
    """Read an argument that is to be a whole number, of Python or of NumPy.

    Args:
        value: The value that was given.
        name: The argument, for the error.
        least: The smallest that is accepted; any by default.
        error: Raised where it is none.

    Returns:
        The number as an `int`.

    Raises:
        MlxTuneError: A truth value, a number with a fraction or a point, no number, or less than `least`.

    Examples:
        >>> import numpy as np
        >>> whole_number(np.int64(4), "bits"), whole_number(8, "batch_size", least=1)
        (4, 8)
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or (least is not None and number < least):
        wanted = " must be a whole number" if least is None else f": give a whole number of at least {least}"
        raise error(f"{name}={value!r}{wanted}.")
    return int(number)


def _parse_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgumentError(f"{text!r} is not a number of bytes. {_ACCEPTED}")
    sign, digits, exponent, prefix, binary, _ = match.groups()
    if binary and not prefix:
        raise InvalidArgumentError(f"{text!r} is not a number of bytes. {_ACCEPTED}")
    if sign == "-":
        raise InvalidArgumentError(f"{text!r} is negative: a number of bytes cannot be. {_ACCEPTED}")
    unit = (_BINARY if binary else _DECIMAL)[prefix.upper()]
    if "." not in digits and exponent is None:
        return int(digits) * unit  # exact, however large
    number = float(digits.replace("_", "") + (f"e{exponent}" if exponent else "")) * unit
    if not math.isfinite(number):
        raise InvalidArgumentError(f"{text!r} is not a number of bytes: it must be finite. {_ACCEPTED}")
    return round(number)


def format_bytes(n: float) -> str:
    """Write a number of bytes with three significant digits, in decimal units.

    Args:
        n: Bytes; a negative number is a difference.

    Returns:
        Text such as `"512 B"`, `"1.50 MB"` or `"12.5 GB"`, which `parse_bytes` reads back to within half a per cent.

    Examples:
        >>> format_bytes(12_500_000_000)
        '12.5 GB'
    """
    sign, n = ("-", -n) if n < 0 else ("", n)
    if n < 999.5:
        return f"{sign}{round(n)} B"
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        n /= 1000
        if n < 999.5 or unit == "PB":
            break
    return f"{sign}{_three_digits(n)} {unit}"


def format_limit(limit_bytes: int) -> str:
    """Write a memory limit; one byte stands for holding each operation back, and is said so.

    Examples:
        >>> format_limit(1), format_limit(20_000_000_000)
        ('the least possible', '20.0 GB')
    """
    return format_bytes(limit_bytes) if limit_bytes > 1 else "the least possible"


def parse_fraction(value: str | float) -> float:
    """Read a share of a whole: 0.2 or `"20%"`.

    Args:
        value: A number from 0 to 1, or text: a number followed by a per cent sign, or a number from 0 to 1.

    Returns:
        The share, from 0 to 1.

    Raises:
        InvalidArgumentError: Not a number, or outside 0 to 1.

    Examples:
        >>> parse_fraction("20%"), parse_fraction(0.9)
        (0.2, 0.9)
    """
    text = value.strip() if isinstance(value, str) else value
    try:
        if isinstance(text, bool):
            raise ValueError
        share = float(text[:-1]) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f'{value!r} is not a share: give a number from 0 to 1, or text such as "20%".'
        ) from None
    if not 0 <= share <= 1:
        raise InvalidArgumentError(f'{value!r} is outside 0 to 1: give a number from 0 to 1, or text such as "20%".')
    return share


def format_percent(share: float, digits: int = 1) -> str:
    """Write a share as per cent.

    Examples:
        >>> format_percent(0.1234)
        '12.3 %'
    """
    return f"{100 * share:.{digits}f} %"


def format_count(n: int, one: str, many: str | None = None) -> str:
    """Write how many there are of something.

    Examples:
        >>> format_count(1, "layer"), format_count(1200, "batch", "batches")
        ('1 layer', '1,200 batches')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def format_names(names: Sequence[str], most: int = 8) -> str:
    """Write names one after the other, and how many there are beyond the first few.

    Examples:
        >>> format_names(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def format_seconds(seconds: float) -> str:
    """Write a time with three significant digits in the unit that suits it.

    Examples:
        >>> format_seconds(0.0123), format_seconds(75)
        ('12.3 ms', '1 min 15 s')
    """
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    for limit, factor, unit in ((0.9995e-3, 1e6, "µs"), (0.9995, 1e3, "ms"), (59.95, 1, "s")):
        if seconds < limit:
            return f"{_three_digits(seconds * factor)} {unit}"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def format_batch(size: int, accumulation_steps: int) -> str:
    """A batch as titles say it, with what it adds up to.

    Examples:
        >>> format_batch(8, 1), format_batch(8, 4)
        ('batch size 8', 'batch size 8 x 4 accumulation steps = 32')
    """
    several = f" x {accumulation_steps} accumulation steps = {size * accumulation_steps}"
    return f"batch size {size}{several if accumulation_steps > 1 else ''}"


def dtype_name(dtype: mx.Dtype) -> str:
    """The short name of a dtype.

    Examples:
        >>> import mlx.core as mx
        >>> dtype_name(mx.bfloat16)
        'bfloat16'
    """
    return str(dtype).rpartition(".")[2]


def number(array: mx.array) -> float:
    """The one number in an array, evaluated.

    Examples:
        >>> import mlx.core as mx
        >>> number(mx.ones(3).sum())
        3.0
    """
    value: Any = array.item()  # MLX's stubs leave open what it is
    return float(value)


def _three_digits(x: float) -> str:
    """`x` from 0 to 999.5 with three significant digits and no exponent."""
    if x < 9.995:
        return f"{x:.2f}"
    return f"{x:.1f}" if x < 99.95 else f"{x:.0f}"
