"""Running a model so that only its weights count: in float32, in evaluation mode, packed weights unpacked on CPUs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.interrupts import interruptible, uninterrupted
from mlx_tune.quantization.models.dense import dense_twin, dequantize_arrays, has_dense_class
from mlx_tune.quantization.models.sites import is_quantized, walk
from mlx_tune.substitution import subclass, substituted

_LOW = (mx.bfloat16, mx.float16)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into the mode that it had, with the arrays that it had.

    Some models put other arrays into themselves while they are called: mlx-lm's Gemma 3n stores a few of its weights
    anew in float32. Measuring must not leave such marks.
    """
    sites = walk(model)
    # A module whose class forgets `super().__init__()`, as mlx-lm's RecurrentGemma, has no mode until it is given one.
    modes = [(site.module, getattr(site.module, "_training", True)) for site in sites]
    items = [(site.module, dict(site.module)) for site in sites]
    with uninterrupted():
        try:
            # Set flag by flag: Module.train() of a layer with quantized inputs would requantize its weights.
            for module, _ in modes:
                module._training = False
            with interruptible():
                yield
        finally:
            for module, mode in modes:
                module._training = mode
            for module, before in items:
                _put_back(module, before)


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    """Give a module the very items that it had; of those in place, nothing is touched."""
    if len(module) == len(before) and all(module.get(name) is value for name, value in before.items()):
        return
    dict.clear(module)
    dict.update(module, before)


@contextmanager
def float32_arithmetic(model: nn.Module) -> Iterator[None]:
    """Let the model compute in float32 from its stored weights, without a copy of them.

    Embeddings hand on float32, and every operation after them takes the wider type. Where MLX's default device is a
    CPU, packed weights are unpacked for each use, in float32 from the stored scales: `mx.quantized_matmul` is tens
    of times slower there. The model's parameters and classes are what they were as soon as the block ends.
    """
    unpack = mx.default_device() == mx.Device(mx.cpu)
    stand_in = functools.cache(_stand_in)  # for this block: one that stays would keep the classes' models alive
    modules = [site.module for site in walk(model)]
    pairs = ((module, stand_in(type(module), unpack and _unpackable(module))) for module in modules)
    with uninterrupted(), substituted((module, kind) for module, kind in pairs if kind is not None), interruptible():
        yield


@contextmanager
def same_random_stream() -> Iterator[None]:
    """Leave MLX's random stream as it was, whatever is drawn meanwhile."""
    key: Any = mx.random.state[0]  # type: ignore[index]
    high, low = (int(word) for word in key.tolist())
    try:
        yield
    finally:
        mx.random.seed((high << 32) | low)  # `seed` makes the key out of the two halves of its argument


def widen(values: Any) -> Any:
    """Half-precision floats in a tree of arguments to float32; everything else as it is."""
    from mlx.utils import tree_map

    def one(value: Any) -> Any:
        low = isinstance(value, mx.array) and value.dtype in _LOW
        return value.astype(mx.float32) if low else value

    return tree_map(one, values)


def unpacked_on_cpu(model: nn.Module) -> bool:
    """True where `float32_arithmetic` evaluates this model through unpacked weights here."""
    return mx.default_device() == mx.Device(mx.cpu) and any(_unpackable(s.module) for s in walk(model))


def _unpackable(module: nn.Module) -> bool:
    return is_quantized(module) and not isinstance(module, nn.QQLinear) and has_dense_class(type(module))


def _stand_in(kind: type, unpack: bool) -> type | None:
    """A subclass that computes the same in float32, or None where the class itself will do."""
    body: dict[str, Any] = {}
    if issubclass(kind, nn.QuantizedEmbedding):
        body["__call__"] = _packed_lookup
        if unpack:
            body["as_linear"] = lambda self, x: dense_twin(self, mx.float32, after=x).as_linear(widen(x))
    elif issubclass(kind, nn.Embedding):
        body["__call__"] = lambda self, x: widen(kind.__call__(self, x))
    elif unpack:
        body["__call__"] = _unpacked_call
    return subclass(kind, body) if body else None


def _unpacked_call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """The call of the unpacked layer, which is unpacked when its input is there and not before."""
    given = (value for value in (*arguments, *keywords.values()) if isinstance(value, mx.array))
    return dense_twin(self, mx.float32, after=next(given, None))(*widen(arguments), **widen(keywords))


def _packed_lookup(self: Any, x: mx.array) -> mx.array:
    """The rows asked for, unpacked in float32."""
    biases = self.get("biases")
    return dequantize_arrays(
        self["weight"][x],
        self["scales"][x],
        None if biases is None else biases[x],
        group_size=self.group_size,
        bits=self.bits,
        mode=self.mode,
    )
