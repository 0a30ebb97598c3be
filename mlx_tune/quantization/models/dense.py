"""Unquantized twins of quantized modules, for quantizing anew and for comparing."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.models.sites import is_quantized


def dequantized_weight(module: nn.Module, dtype: mx.Dtype = mx.float32, *, after: mx.array | None = None) -> mx.array:
    """The weights of a quantized module as numbers, not yet evaluated.

    They are reconstructed in float32 from the scales and biases as stored: doing it in bfloat16 rounds again, which
    would count as quantization error what is not.

    Args:
        module: Any module with packed weights.
        dtype: The dtype of the result.
        after: An array that is to be computed first. Without one MLX unpacks all layers of a model before it computes
            with the first, whatever its memory limit.
    """
    weight, scales, biases = module["weight"], module["scales"], module.get("biases")
    if after is not None:
        (weight,) = mx.depends([weight], [after])
    mode = getattr(module, "mode", "affine")
    formats: dict[str, Any] = {"group_size": module.group_size, "bits": module.bits, "mode": mode}
    global_scale = module.get("global_scale")
    if global_scale is not None:  # a stack of experts, each with a scale of its own
        experts = [
            mx.dequantize(w, s, global_scale=g, dtype=mx.float32, **formats)
            for w, s, g in zip(weight, scales, global_scale, strict=True)
        ]
        return mx.stack(experts).astype(dtype)
    return dequantize_arrays(weight, scales, biases, **formats).astype(dtype)


def dequantize_arrays(
    packed: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    """`mx.dequantize` in float32, whatever the scales are stored in.

    Examples:
        >>> w = mx.ones((2, 64), dtype=mx.bfloat16)
        >>> dequantize_arrays(*mx.quantize(w), group_size=64, bits=4).dtype
        mlx.core.float32
    """
    if mode == "affine":
        scales = scales.astype(mx.float32)
        biases = None if biases is None else biases.astype(mx.float32)
    return mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32)


def dense_twin(module: nn.Module, dtype: mx.Dtype | None = None, *, after: mx.array | None = None) -> Any:
    """An unquantized module that computes the same; its weights are a recipe that holds no memory yet.

    Args:
        module: A quantized module; any other is handed back as it is.
        dtype: Of the twin's weights; that of the scales by default, where they are floats.
        after: As for `dequantized_weight`.

    Raises:
        QuantizationError: The class has no unquantized counterpart that could be found.

    Examples:
        >>> twin = dense_twin(nn.Linear(64, 8).to_quantized())
        >>> type(twin).__name__, twin.weight.shape
        ('Linear', (8, 64))
    """
    if not is_quantized(module):
        return module
    dense_class = _dense_class(type(module))
    twin = dense_class.__new__(dense_class)
    nn.Module.__init__(twin)
    if dtype is None:
        dtype = module["scales"].dtype if "biases" in module else _float_dtype(module)
    for name, value in module.items():
        if name not in ("weight", "scales", "biases", "global_scale"):
            dict.__setitem__(twin, name, value)
    twin["weight"] = dequantized_weight(module, dtype, after=after)
    for name, value in vars(module).items():  # such as a fused layer's split points
        if name not in vars(twin) and name not in ("bits", "group_size", "mode", "biases", "global_scale"):
            vars(twin)[name] = value
    twin._training = module._training
    return twin


def has_dense_class(quantized: type) -> bool:
    """True where `dense_twin` knows what to make of a class of quantized modules."""
    return find_dense_class(quantized) is not None


def _dense_class(quantized: type) -> type[nn.Module]:
    found = find_dense_class(quantized)
    if found is None:
        raise QuantizationError(
            f"{quantized.__name__} is quantized, and no unquantized class for it could be found beside it. "
            "Quantize the original model instead, or add its path to skip=."
        )
    return found


def find_dense_class(quantized: type) -> type[nn.Module] | None:
    """The class whose packed form a class of quantized modules is; None where there is none to be found."""
    for base in quantized.__mro__:
        if base in (nn.QuantizedLinear, nn.QQLinear):
            return nn.Linear
        if base is nn.QuantizedEmbedding:
            return nn.Embedding
        # mlx-lm names them alike and keeps them side by side: SwitchLinear and QuantizedSwitchLinear.
        candidate = getattr(sys.modules.get(base.__module__), base.__name__.replace("Quantized", ""), None)
        if "Quantized" in base.__name__ and isinstance(candidate, type) and issubclass(candidate, nn.Module):
            return candidate
    return None


def _float_dtype(module: nn.Module) -> mx.Dtype:
    bias = module.get("bias")
    return bias.dtype if isinstance(bias, mx.array) else mx.bfloat16
