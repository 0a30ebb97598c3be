"""Packed weights that pass what a dtype can hold."""

from __future__ import annotations

import mlx.core as mx

from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.formats.packing import PackedArrays, dequantize_float32
from mlx_tune.units import number


def overflows(arrays: PackedArrays, wanted: Format, dtype: mx.Dtype) -> bool:
    """True where unpacking meets numbers that the dtype does not hold.

    MLX unpacks affine weights in the dtype of their scales, code times scale first, and those of other modes in that of
    the inputs.

    Args:
        arrays: Packed weights, scales and biases.
        wanted: Their format.
        dtype: Of the inputs, which other modes are unpacked in.

    Examples:
        >>> weight = mx.array([[40000.0, -40000.0] * 32], dtype=mx.float16)
        >>> [overflows(mx.quantize(weight.astype(t), 64, 4), Format(4, 64), t) for t in (mx.float16, mx.bfloat16)]
        [True, False]
    """
    packed, scales, biases = arrays
    if biases is None:
        after = dequantize_float32(packed, scales, None, **wanted.keywords())
        return not number((mx.abs(after) <= mx.finfo(dtype).max).all())
    top, most = float(2**wanted.bits - 1), mx.finfo(scales.dtype).max
    scale, bias = scales.astype(mx.float32), biases.astype(mx.float32)
    fits = (mx.abs(scale * top) <= most) & (mx.abs(bias) <= most) & (mx.abs(bias + scale * top) <= most)
    return not number(fits.all())
