"""Weights that lie on a grid already, from packed weights that were unpacked or from training for quantization."""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_tune.quantization.formats.modes import AFFINE_GROUP_SIZES, Format
from mlx_tune.quantization.formats.packed_arrays import pack_weight, row_chunks, rows_of, unpacked
from mlx_tune.quantization.formats.packing import PackedArrays
from mlx_tune.units import number

#: The error of a group as a share of its largest weight, in units of its dtype's resolution: weights, scales and biases
#: have each been rounded to it.
_ROUNDINGS = 4

#: The largest error as a share of a grid's step. One of weights that lie on no grid is up to half a step.
_OF_A_STEP = 1 / 8

#: Rows of a weight that are looked at, and the most columns of them.
_ROWS, _COLUMNS = 16, 512

#: Groups with at most so many different weights can lie on a grid of 4 bits.
_LEVELS = 16


def recovers(weight: mx.array, arrays: PackedArrays, wanted: Format) -> bool:
    """True where packed weights differ from the weights by no more than the rounding of their dtype.

    In affine mode no weight may be further than an eighth of a step from its level either, so that a fine grid does not
    count as the weights' own.

    Args:
        weight: The weights before, `[..., outputs, inputs]`.
        arrays: The packed ones.
        wanted: Their format.

    Examples:
        >>> weight = mx.arange(128).reshape(2, 64) % 16 * 0.5 - 3
        >>> wanted = Format(4, 32)
        >>> recovers(weight, pack_weight(weight, wanted, "optimal")[0], wanted)
        True
        >>> weight = mx.random.normal((2, 64))
        >>> recovers(weight, pack_weight(weight, wanted, "optimal")[0], wanted)
        False
    """
    after, dtypes = unpacked(arrays, wanted), {weight.dtype}
    if wanted.mode == "affine":
        dtypes.add(arrays[1].dtype)
    resolution = _ROUNDINGS * max(float(mx.finfo(dtype).eps) for dtype in dtypes)
    for rows in row_chunks(weight):
        before, now = rows_of(weight, rows), after(rows)
        error, largest = (
            mx.abs(x).reshape(x.shape[0], -1, wanted.group_size).max(-1)
            for x in (before.astype(mx.float32) - now, before.astype(mx.float32))
        )
        allowed = resolution * largest
        if wanted.mode == "affine":
            step = mx.abs(rows_of(arrays[1], rows).astype(mx.float32))
            allowed = mx.where(step > 0, mx.minimum(allowed, step * _OF_A_STEP), allowed)
        else:  # the levels are the format's own, so that nothing but the weights was rounded
            allowed = allowed / _ROUNDINGS
        if not (error <= allowed).all().item():
            return False
    return True


def grid_of(weight: mx.array) -> Format | None:
    """The smallest format of at most 4 bits that holds a weight's values without loss, as far as a few rows show.

    Args:
        weight: `[..., outputs, inputs]`. A few rows of it are read.

    Returns:
        The fewest bits in the largest groups in which "optimal" recovers these rows; else mode
        "mxfp4"; None where neither does.

    Examples:
        >>> scales = mx.array([[1.0, 0.5], [0.25, 2.0]]).reshape(2, 2, 1)
        >>> print(grid_of((scales * mx.random.randint(-1, 2, (2, 2, 64))).reshape(2, 128)))
        2 bits, group 64
        >>> print(grid_of(mx.random.normal((2, 128))))
        None
    """
    columns = weight.shape[-1]
    sizes = [size for size in AFFINE_GROUP_SIZES if columns % size == 0]
    if not sizes:
        return None
    every = weight.reshape(-1, columns)
    count = min(_ROWS, every.shape[0])
    width = min(columns, _COLUMNS) // sizes[-1] * sizes[-1]
    some = every[mx.arange(count) * (every.shape[0] // count), :width]
    ordered = mx.sort(some.astype(mx.float32).reshape(-1, sizes[0]), axis=-1)
    levels = 1 + (ordered[:, 1:] > ordered[:, :-1]).sum(-1)
    most = int(number(levels.max()))
    if not 1 < most <= _LEVELS or not math.isfinite(number(ordered.sum())):
        return None
    fewest = math.ceil(math.log2(most))
    choices = [Format(bits, size) for bits in (1, 2, 3, 4) if bits >= fewest for size in reversed(sizes)]
    choices.append(Format(4, 32, "mxfp4"))
    return next((f for f in choices if recovers(some, pack_weight(some, f, "optimal")[0], f)), None)
