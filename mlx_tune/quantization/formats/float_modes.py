"""Better scales for the modes whose codes are small floating point numbers: mxfp4, mxfp8 and nvfp4.

`mx.quantize` takes a group's scale from its largest weight. A scale one step up or down often leaves less error: a
finer grid for the many against a clipped largest, or, in 4 bits, the largest weight on 4 instead of on 6, where the
grid is coarsest (Cook et al., Four Over Six, 2025). Scales have few values, so the ones around are simply tried.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx

from mlx_tune.devices import computes_on_cpu
from mlx_tune.quantization.formats.modes import FIXED_MODES, Effort
from mlx_tune.quantization.formats.packing import pack
from mlx_tune.quantization.formats.powers_of_two import unit_of

#: The magnitudes of a 4-bit float with two bits of exponent and one of mantissa, by code, and what lies between them.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

#: The largest 8-bit float (E4M3) and, as a scale, its byte.
_FP8_MOST, _FP8_MOST_BYTE = 448.0, 126

#: The exponent of the largest code in the modes whose scales are powers of two.
_MOST_EXPONENT = {"mxfp4": 2, "mxfp8": 8}

#: Steps of the scale's byte that are tried: powers of two, or eighths of an octave.
_STEPS = {
    ("mxfp4", "fast"): (-1, 0, 1),
    ("mxfp4", "best"): (-2, -1, 0, 1),
    ("mxfp8", "fast"): (-1, 0, 1),
    ("mxfp8", "best"): (-2, -1, 0, 1),
    ("nvfp4", "fast"): (-3, -2, -1, 1, 2, 3, 4, 5),
    ("nvfp4", "best"): (*range(-8, 0), *range(1, 9)),
}

#: Weights worked on at once.
_CHUNK_WEIGHTS = 1 << 18


def quantize_float(weight: mx.array, mode: str, *, effort: Effort = "fast") -> tuple[mx.array, mx.array]:
    """Quantize a weight in one of the floating point modes with less squared error than `mx.quantize`.

    Args:
        weight: `[..., rows, columns]`; columns a multiple of the mode's group size.
        mode: "mxfp4", "mxfp8" or "nvfp4".
        effort: The number of scales that are tried.

    Returns:
        Packed codes and scales in `mx.quantize`'s format. No group has more error than `mx.quantize` leaves it.

    Examples:
        >>> w = mx.random.normal((8, 64))
        >>> packed, scales = quantize_float(w, "nvfp4")
        >>> packed.shape, scales.shape, scales.dtype
        ((8, 8), (8, 4), mlx.core.uint8)
    """
    group_size, bits = FIXED_MODES[mode]
    *lead, columns = weight.shape
    rows = weight.reshape(-1, columns)
    improve = _improver(mode, _STEPS[mode, effort])
    step = max(1, _CHUNK_WEIGHTS // columns)
    done = []
    for i in range(0, rows.shape[0], step):
        part = rows[i : i + step]
        packed, scales, *_ = mx.quantize(part, group_size, bits, mode=mode)
        if columns % 32 == 0:  # else rows do not end on whole packs of 32 codes
            packed, scales = improve(part, packed, scales)
        mx.eval(packed, scales)
        done.append((packed, scales))
    packed, scales = (mx.concatenate(list(parts)).reshape(*lead, -1) for parts in zip(*done, strict=True))
    return packed, scales


@functools.cache
def _improver(mode: str, steps: tuple[int, ...]) -> Callable[..., tuple[mx.array, mx.array]]:
    group_size, bits = FIXED_MODES[mode]
    most_byte = _FP8_MOST_BYTE if mode == "nvfp4" else 254

    def value_of(scales: mx.array) -> mx.array:
        if mode == "nvfp4":
            return mx.from_fp8(scales.astype(mx.uint8), dtype=mx.float32)
        return mx.power(mx.array(2.0), scales.astype(mx.float32) - 127)

    def codes_of(ratio: mx.array) -> tuple[mx.array, mx.array]:
        """Codes of weights over their scale, and what they stand for."""
        if bits == 8:
            codes = mx.to_fp8(mx.clip(ratio, -_FP8_MOST, _FP8_MOST))
            return codes, mx.from_fp8(codes, dtype=mx.float32)
        size = mx.abs(ratio)
        place = sum((size > edge).astype(mx.uint8) for edge in _FP4_BETWEEN)
        magnitude = mx.array(_FP4)[place]
        codes = place + 8 * (ratio < 0).astype(mx.uint8)
        return codes, mx.where(ratio < 0, -magnitude, magnitude)

    def middle(scales: mx.array, unit: mx.array) -> mx.array:
        """The byte to try around: MLX's own, unless that wrapped around, as with weights below 2**-125."""
        own = scales.astype(mx.int32)
        if mode not in _MOST_EXPONENT:
            return own
        covering = mx.maximum(mx.right_shift(unit.view(mx.int32), 23) - _MOST_EXPONENT[mode], 1)
        return mx.clip(own, covering, covering + 1)

    def improve(weight: mx.array, packed: mx.array, scales: mx.array) -> tuple[mx.array, mx.array]:
        groups = weight.astype(mx.float32).reshape(*scales.shape, group_size)
        unit = unit_of(mx.abs(groups).max(-1))

        def error_of(standing: mx.array) -> mx.array:
            square = mx.square(groups / unit[..., None] - standing / unit[..., None]).sum(-1)
            return mx.where(mx.isfinite(square), square, float("inf"))

        plain = mx.dequantize(packed, scales, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32)
        least = error_of(plain.reshape(groups.shape))
        centre, chosen = middle(scales, unit), scales.astype(mx.int32)
        for move in steps:
            candidate = centre + move
            possible = (candidate >= 1) & (candidate <= most_byte)
            scale = value_of(mx.clip(candidate, 1, most_byte))[..., None]
            _, standing = codes_of(groups / scale)
            error = error_of(standing * scale)
            better = possible & (error < least)
            least, chosen = mx.where(better, error, least), mx.where(better, candidate, chosen)
        codes, _ = codes_of(groups / value_of(mx.maximum(chosen, 1))[..., None])
        words = math.prod((group_size, bits)) // 32
        anew = pack(codes.reshape(weight.shape), bits).reshape(*scales.shape, words)
        kept = packed.reshape(*scales.shape, words)
        moved = (chosen != scales)[..., None]
        return mx.where(moved, anew, kept).reshape(packed.shape), chosen.astype(mx.uint8)

    # On a CPU compiling starts a C++ compiler for every kernel, which takes longer than most models do.
    return improve if computes_on_cpu() else mx.compile(improve)
