"""Quantized layers whose scales and biases can be trained: the codes stay, the grid under them moves.

Each group gets two numbers in units of its own quantization step: how far the ends of the grid stretch, and how far
the grid shifts. One learning rate then means the same for every layer and every number of bits. The forward pass
uses scales and biases rounded as they will be stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.formats.overflow import overflows
from mlx_tune.quantization.formats.packing import unpack
from mlx_tune.quantization.models.layers import dense_twin, has_dense_class, is_quantized
from mlx_tune.quantization.models.sites import Site, WalkedModel, in_places
from mlx_tune.substitution import plain_class, subclass, substitute

#: Names of the two trained arrays of a layer.
NAMES = ("stretch", "shift")


def trainable_sites(model: WalkedModel) -> list[Site]:
    """Layers with affine scales and biases, each once."""
    return [
        site
        for site in model.sites
        if is_quantized(site.module)
        and getattr(site.module, "mode", "affine") == "affine"
        and isinstance(site.module.get("biases"), mx.array)
        and has_dense_class(type(site.module))
    ]


@contextmanager
def trained_in_place(sites: Sequence[Site], dtype: mx.Dtype) -> Iterator[list[nn.Module]]:
    """Put trainable layers in the places of quantized ones while the block runs.

    Args:
        sites: Those of quantized layers of a model.
        dtype: The dtype that weights are worked out in for use.

    Yields:
        The trainable layers, in the order of the sites.
    """
    made = [_trainable(site.module, dtype) for site in sites]
    with in_places(zip(sites, made, strict=True)):
        yield made


def stored_pair(layer: Any) -> tuple[mx.array, mx.array]:
    """A trainable layer's scales and biases as they will be stored."""
    scales, biases = _pair(layer)
    return scales.astype(layer._scales.dtype), biases.astype(layer._scales.dtype)


def made_dense(layer: Any) -> nn.Module:
    """A layer that multiplies by the weight that a trainable one stands for now, which is worked out once.

    Args:
        layer: A trainable layer, linear or an embedding whose table makes logits; or any other, frozen as it is.
    """
    trains = getattr(layer, "_form", None) is not None
    if not trains and plain_class(type(layer)) not in (nn.Linear, nn.Embedding):
        other: nn.Module = layer
        return other
    dense = nn.Linear(1, 1, bias=False)
    dense.weight = _weight(layer) if trains else layer.weight
    if "bias" in layer:
        dense.bias = layer.bias
    return dense.freeze(keys=["bias"] if trains else None)


def stays_in_range(layer: Any) -> bool:
    """True where unpacking the layer, as it will be stored, meets no number that its dtype does not hold."""
    bits, size, _ = layer._form
    scales, biases = stored_pair(layer)
    return not overflows((layer._packed, scales, biases), Format(bits, size), scales.dtype)


def _trainable(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    layer: Any = dense_twin(module, dtype)
    dict.pop(layer, "weight")
    # An underscore keeps arrays out of a module's parameters.
    layer._packed, layer._scales, layer._biases = module["weight"], module["scales"], module["biases"]
    layer._form = (module.bits, module.group_size, dtype)
    for name in NAMES:
        layer[name] = mx.zeros(module["scales"].shape, dtype=mx.float32)
    kind: object = type(layer)
    substitute(layer, _training_class(kind))
    trained: nn.Module = layer
    return trained


def _pair(layer: Any) -> tuple[mx.array, mx.array]:
    bits, _, _ = layer._form
    half = max((2**bits - 1) / 2, 0.5)
    scale, bias = layer._scales.astype(mx.float32), layer._biases.astype(mx.float32)
    new = scale * (1 + layer["stretch"] / half)
    # Stretching leaves the middle of the grid where it is, so the two numbers hardly disturb each other.
    return new, bias + scale * layer["shift"] - (new - scale) * half


def _as_stored(value: mx.array, dtype: mx.Dtype) -> mx.array:
    """Rounded as it will be stored, with the gradient of the number itself."""
    return value + mx.stop_gradient(value.astype(dtype).astype(mx.float32) - value)


def _weight(layer: Any, rows: mx.array | None = None) -> mx.array:
    bits, size, dtype = layer._form
    scale, bias = (_as_stored(value, layer._scales.dtype) for value in _pair(layer))
    packed = layer._packed
    if rows is not None:
        packed, scale, bias = packed[rows], scale[rows], bias[rows]
    codes = unpack(packed, bits)
    codes = codes.reshape(*codes.shape[:-1], -1, size).astype(mx.float32)
    weight = codes * scale[..., None] + bias[..., None]
    return weight.reshape(*weight.shape[:-2], -1).astype(dtype)


@functools.cache
def _training_class(kind: type) -> type:
    """The layer's own class, computing with the weights that its trained grid stands for."""

    def through(name: str) -> object:
        method = getattr(kind, name)

        def call(self: Any, *arguments: object, **keywords: object) -> object:
            dict.__setitem__(self, "weight", _weight(self))
            try:
                return method(self, *arguments, **keywords)
            finally:
                dict.pop(self, "weight")

        return call

    if issubclass(kind, nn.Embedding):
        return subclass(kind, {"__call__": _weight, "as_linear": through("as_linear")})
    return subclass(kind, {"__call__": through("__call__")})
