"""Multiplications in place of MLX's kernels, some of them wrong on purpose."""

from __future__ import annotations

import math
from collections import Counter

import mlx.core as mx

from mlx_tune.quantization.formats.modes import AFFINE_BITS, AFFINE_GROUP_SIZES, FIXED_MODES, Format
from mlx_tune.quantization.planning.kernel_trials import Kernels

FORMATS = [Format(bits, size) for bits in AFFINE_BITS for size in AFFINE_GROUP_SIZES]
FORMATS += [Format(bits, size, mode) for mode, (size, bits) in FIXED_MODES.items()]
USES = ("product", "batched", "gathered", "lookup")


class Planted:
    """MLX's functions, each call counted, some of their results spoilt."""

    def __init__(self, multiply=None, gather=None, dequantize=None):
        self.calls = Counter()
        spoil = {"multiply": multiply, "gather": gather, "dequantize": dequantize}
        honest = Kernels()
        self.kernels = Kernels(**{name: self._counted(name, getattr(honest, name), spoil[name]) for name in spoil})

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
