"""Running a model so that only its weights count: in float32, in evaluation mode, packed weights unpacked on CPUs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.devices import computes_on_cpu
from mlx_tune.interrupts import interruptible, uninterrupted
from mlx_tune.memory import memory_limit
from mlx_tune.quantization.formats.packing import dequantize_float32
from mlx_tune.quantization.models.batches import widen
from mlx_tune.quantization.models.layers import dense_twin, has_dense_class, is_quantized
from mlx_tune.quantization.models.sites import Site, own_arrays, sites_of
from mlx_tune.substitution import subclass, substituted
from mlx_tune.upstream import has_mode, set_mode

#: Memory that an evaluation may take beside the model before MLX is held back from queueing ahead.
ROOM_BYTES = 256 << 20


@contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """Have the model compute in float32, and no more of its weights widened at a time than there is room for.

    Without a limit MLX queues ahead, and holds a float32 copy of every layer that it has queued.
    """
    sites = sites_of(model)
    with _evaluating(sites), _computing_in_float32(sites), memory_limit(_limit_bytes(sites)):
        yield


def _limit_bytes(sites: Sequence[Site]) -> int:
    arrays = {id(a): a.nbytes for site in sites for a in own_arrays(site.module).values()}
    wanted = max(mx.get_active_memory(), sum(arrays.values())) + ROOM_BYTES
    present = mx.set_memory_limit(wanted)  # the only way to learn it
    mx.set_memory_limit(present)
    return min(wanted, present)


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and, where the device is a CPU, float32, which alone is fast there."""
    sites = sites_of(model)
    with ExitStack() as stack:
        stack.enter_context(_evaluating(sites))
        if computes_on_cpu():
            stack.enter_context(_computing_in_float32(sites))
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into the mode that it had, with the arrays that it had.

    Some models put other arrays into themselves while they are called: mlx-lm's Gemma 3n stores a few of its weights
    anew in float32. Measuring must not leave such marks.
    """
    with _evaluating(sites_of(model)):
        yield


@contextmanager
def _evaluating(sites: Sequence[Site]) -> Iterator[None]:
    # A module whose class forgets `super().__init__()`, as mlx-lm's RecurrentGemma, has no mode until it is given one.
    modes = [(site.module, site.module.training if has_mode(site.module) else True) for site in sites]
    items = [(site.module, dict(site.module)) for site in sites]
    with uninterrupted():
        try:
            # Set flag by flag: Module.train() of a layer with quantized inputs would requantize its weights.
            for module, _ in modes:
                set_mode(module, False)
            with interruptible():
                yield
        finally:
            for module, mode in modes:
                set_mode(module, mode)
            for module, before in items:
                _put_back(module, before)


def _put_back(module: nn.Module, before: dict[str, object]) -> None:
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
    with _computing_in_float32(sites_of(model)):
        yield


@contextmanager
def _computing_in_float32(sites: Sequence[Site]) -> Iterator[None]:
    unpack = computes_on_cpu()
    stand_in = functools.cache(_stand_in)  # for this block: one that stays would keep the classes' models alive
    pairs = ((s.module, stand_in(type(s.module), unpack and _unpackable(s.module))) for s in sites)
    with uninterrupted(), substituted((module, kind) for module, kind in pairs if kind is not None), interruptible():
        yield


def unpacked_on_cpu(model: nn.Module) -> bool:
    """True where `float32_arithmetic` evaluates this model through unpacked weights here."""
    return computes_on_cpu() and any(_unpackable(s.module) for s in sites_of(model))


def _unpackable(module: nn.Module) -> bool:
    return is_quantized(module) and not isinstance(module, nn.QQLinear) and has_dense_class(type(module))


def _stand_in(kind: type, unpack: bool) -> type | None:
    """A subclass that computes the same in float32, or None where the class itself will do."""
    body: dict[str, object] = {}
    if issubclass(kind, nn.QuantizedEmbedding):
        body["__call__"] = _packed_lookup
        if unpack:
            body["as_linear"] = lambda self, x: dense_twin(self, mx.float32, after=x).as_linear(widen(x))
    elif issubclass(kind, nn.Embedding):
        body["__call__"] = lambda self, x: widen(kind.__call__(self, x))
    elif unpack:
        body["__call__"] = _unpacked_call
    return subclass(kind, body) if body else None


def _unpacked_call(self: Any, *arguments: object, **keywords: object) -> object:
    """The call of the unpacked layer, which is unpacked when its input is there and not before."""
    given = (value for value in (*arguments, *keywords.values()) if isinstance(value, mx.array))
    return dense_twin(self, mx.float32, after=next(given, None))(*widen(arguments), **widen(keywords))


def _packed_lookup(self: Any, x: mx.array) -> mx.array:
    """The rows asked for, unpacked in float32."""
    biases = self.get("biases")
    return dequantize_float32(
        self["weight"][x],
        self["scales"][x],
        None if biases is None else biases[x],
        group_size=self.group_size,
        bits=self.bits,
        mode=self.mode,
    )
