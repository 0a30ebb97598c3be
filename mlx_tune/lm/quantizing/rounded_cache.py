"""A model of mlx-lm whose caches hold keys and values as they come out of fewer bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_tune.quantization.formats.packing import dequantize_float32, quantize_nearest


class Rounding(NamedTuple):
    """The bits of keys and values, and how they are made.

    Attributes:
        key_bits: Bits of keys; None where they stay as they are.
        value_bits: The same of values.
        group_size: Numbers that share a scale.
        dtype: The dtype that is quantized, and that of scales: the model's own, whatever it computes in.
    """

    key_bits: int | None
    value_bits: int | None
    group_size: int
    dtype: mx.Dtype

    def rounded(self, x: mx.array, bits: int | None) -> mx.array:
        """Keys or values `[batch, heads, length, width]` as they come out of so many bits."""
        if bits is None:
            return x
        packed = quantize_nearest(x.astype(self.dtype), self.group_size, bits)
        return dequantize_float32(*packed, bits, self.group_size).astype(x.dtype)


class RoundedCache(KVCache):  # type: ignore[misc]
    """A cache that hands back what quantizing leaves of keys and values.

    Attention on packed keys computes the same from the same numbers; MLX's kernels for it are slow on CPUs.

    Args:
        rounding: The bits.
    """

    def __init__(self, rounding: Rounding) -> None:
        """Begin empty."""
        super().__init__()
        self._rounding = rounding

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Round what comes, and hand on all that is there."""
        way = self._rounding
        return super().update_and_fetch(way.rounded(keys, way.key_bits), way.rounded(values, way.value_bits))


class RoundingCaches(nn.Module):
    """A model that is called with new caches each time, those that mlx-lm would quantize being rounded.

    Args:
        model: A model of mlx-lm.
        rounding: The bits.

    Examples:
        ```python
        logits = RoundingCaches(model, Rounding(4, 4, 64, mx.bfloat16))(tokens)
        ```
    """

    def __init__(self, model: nn.Module, rounding: Rounding) -> None:
        """Wrap the model, which stays as it is."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self._rounding = rounding

    def __call__(self, tokens: mx.array) -> Any:
        """The model's logits `[batch, length, vocabulary]`."""
        caches = make_prompt_cache(self.model)
        return self.model(tokens, cache=[RoundedCache(self._rounding) if type(c) is KVCache else c for c in caches])
