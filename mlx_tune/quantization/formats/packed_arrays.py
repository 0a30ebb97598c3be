"""A weight to packed arrays and back: the choice of the packer, and what the packed weight lost."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_tune.devices import computes_on_cpu
from mlx_tune.quantization.formats.affine import quantize_affine
from mlx_tune.quantization.formats.float_modes import quantize_float
from mlx_tune.quantization.formats.modes import Effort, Format
from mlx_tune.quantization.formats.packing import PackedArrays, dequantize_float32, quantize_nearest
from mlx_tune.units import number

#: Weights looked at together where a whole layer would need several float32 copies of itself at once.
#: A GPU has more room and waits longer for each piece to end.
_CHUNK_WEIGHTS, _CHUNK_WEIGHTS_GPU = 1 << 19, 1 << 22


def pack_weight(
    weight: mx.array, wanted: Format, method: str, effort: Effort = "fast", energy: mx.array | None = None
) -> tuple[PackedArrays, str]:
    """Packed weights, and the method that was used.

    Args:
        weight: [..., outputs, inputs].
        wanted: The format.
        method: "nearest" or "optimal".
        effort: "fast" or "best".
        energy: The weight of a squared error in each column for "optimal", `[inputs]`; all alike by default.
    """
    scale_dtype = getattr(mx, wanted.scale_dtype) if wanted.scale_dtype else weight.dtype
    if method == "optimal" and wanted.mode == "affine":
        found = quantize_affine(
            weight, wanted.bits, wanted.group_size, effort=effort, importance=energy, scale_dtype=scale_dtype
        )
        return found, "optimal"
    if method == "optimal":
        return (*quantize_float(weight, wanted.mode, effort=effort), None), "optimal"
    return quantize_nearest(weight.astype(scale_dtype), **wanted.keywords()), "nearest"


def signal_to_noise_db(weight: mx.array, arrays: PackedArrays, wanted: Format, energy: mx.array | None = None) -> float:
    """10 log10 of the weights' power over that of their error, reconstructed in float32.

    Args:
        weight: The weights before.
        arrays: The packed ones.
        wanted: Their format.
        energy: The weight of a square in each column, `[inputs]`; all alike by default.

    Returns:
        Decibels; `inf` where the error is zero.
    """
    return _decibels(weight, unpacked(arrays, wanted), energy)


def unpacked(arrays: PackedArrays, wanted: Format) -> Callable[[slice], mx.array]:
    """A function from rows, over all leading axes together, to the weights that packed arrays stand for, in float32."""
    packed, scales, biases = arrays

    def after(rows: slice) -> mx.array:
        some = None if biases is None else rows_of(biases, rows)
        return dequantize_float32(rows_of(packed, rows), rows_of(scales, rows), some, **wanted.keywords())

    return after


def signal_to_noise_db_between(weight: mx.array, changed: mx.array) -> float:
    """The same for two arrays of weights of one shape."""
    return _decibels(weight, lambda rows: rows_of(changed, rows).astype(mx.float32))


def _decibels(weight: mx.array, after: Callable[[slice], mx.array], energy: mx.array | None = None) -> float:
    signal = noise = 0.0
    share: mx.array | float = 1.0 if energy is None else mx.sqrt(energy / mx.maximum(energy.max(), 1e-30))
    for rows in row_chunks(weight):
        before = rows_of(weight, rows).astype(mx.float32)
        largest = mx.abs(before).max()
        unit = mx.where(largest > 0, largest, 1)  # squares of very large or small weights leave float32's range
        power, error = mx.square(before / unit * share), mx.square((before - after(rows)) / unit * share)
        power, error = power.sum(), error.sum()
        mx.eval(power, error, unit)
        signal += number(power) * number(unit) ** 2
        noise += number(error) * number(unit) ** 2
    if noise == 0:
        return math.inf
    # The power of what is infinite or no number is infinite, however large the weights.
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def not_finite(weight: mx.array) -> int:
    """The number of weights that are NaN or infinite, without a copy of them."""
    return sum(int(number((~mx.isfinite(rows_of(weight, rows))).sum())) for rows in row_chunks(weight))


def row_chunks(weight: mx.array) -> list[slice]:
    """Slices over the rows of all leading axes together."""
    rows = math.prod(weight.shape[:-1])
    at_once = _CHUNK_WEIGHTS if computes_on_cpu() else _CHUNK_WEIGHTS_GPU
    step = max(1, at_once // max(1, weight.shape[-1]))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def rows_of(array: mx.array, rows: slice) -> mx.array:
    return array.reshape(-1, array.shape[-1])[rows]
