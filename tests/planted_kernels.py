"""Honest multiplications in place of MLX's kernels, whose faults differ by device, and some wrong on purpose."""

from __future__ import annotations

import math
from collections import Counter

import mlx.core as mx

from mlx_tune.quantization.formats.modes import AFFINE_BITS, AFFINE_GROUP_SIZES, FIXED_MODES, Format
from mlx_tune.quantization.planning.kernel_trials import Kernels

FORMATS = [Format(bits, size) for bits in AFFINE_BITS for size in AFFINE_GROUP_SIZES]
FORMATS += [Format(bits, size, mode) for mode, (size, bits) in FIXED_MODES.items()]
USES = ("product", "batched", "gathered", "lookup")


def numbers(packed, scales, biases, parts):
    """The weights in float32, unpacked on the processor."""
    if parts["mode"] == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(packed, scales, biases, dtype=mx.float32, stream=mx.cpu, **parts)


def product(rows, weights):
    with mx.stream(mx.cpu):
        return (rows.astype(mx.float32) @ weights.swapaxes(-1, -2)).astype(rows.dtype)


def multiply(inputs, packed, *, scales, biases, transpose, **parts):
    return product(inputs, numbers(packed, scales, biases, parts))


def gather(inputs, packed, scales, biases, *, rhs_indices, transpose, sorted_indices, **parts):
    return product(inputs, numbers(packed, scales, biases, parts)[rhs_indices])


def dequantize(packed, *, scales, biases, **parts):
    return numbers(packed, scales, biases, parts)


class Planted:
    """Functions that are right on every device, each call counted, some of their results spoilt."""

    def __init__(self, **spoilt):
        self.calls = Counter()
        honest = {"multiply": multiply, "gather": gather, "dequantize": dequantize}
        self.kernels = Kernels(**{name: self._counted(name, honest[name], spoilt.get(name)) for name in honest})
        assert spoilt.keys() <= honest.keys()

    def _counted(self, name, honest, spoil):
        def call(*arrays, **parts):
            self.calls[name] += 1
            result = honest(*arrays, **parts)
            return result if spoil is None else spoil(result, arrays, parts)

        return call


def garbage(result, *_):
    return mx.random.normal(result.shape, key=mx.random.key(5)).astype(result.dtype) * 3


def nan(result, arrays, parts):
    return mx.full(result.shape, math.nan, dtype=result.dtype)


def wrong_at_width_128_from_two_rows(result, arrays, parts):
    inputs = arrays[0]
    hit = inputs.shape[-1] == 128 and inputs.shape[-2] > 1 and parts["mode"] == "affine" and parts["bits"] in (4, 8)
    return garbage(result) if hit else result
