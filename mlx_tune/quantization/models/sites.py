"""A model, walked once: its modules, where each of them stands, and the model run so that only its weights count.

That is in float32, in evaluation mode, and with packed weights unpacked on CPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_tune.devices import computes_on_cpu
from mlx_tune.errors import QuantizationError
from mlx_tune.interrupts import interruptible, uninterrupted
from mlx_tune.memory import memory_limit
from mlx_tune.quantization.formats.packing import dequantize_float32
from mlx_tune.quantization.models.layers import dense_twin, has_dense_class, is_quantized
from mlx_tune.substitution import subclass, substituted
from mlx_tune.upstream import has_mode, set_mode

#: Memory that an evaluation may take beside the model before MLX is held back from queueing ahead.
ROOM_BYTES = 256 << 20

#: Dtypes that are widened.
_LOW = (mx.bfloat16, mx.float16)


@dataclass(frozen=True, eq=False)
class Site:
    """A module's places in a model.

    Attributes:
        paths: Their dotted paths, the first as the walk finds it; more than one where a module is used twice.
        places: For each, the module, list or dictionary that holds it, and its name or number there.
    """

    paths: tuple[str, ...]
    places: tuple[tuple[Any, Any], ...]

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]

    @property
    def module(self) -> nn.Module:
        """The module that stands there now: looked up, so that a site keeps no replaced weights alive."""
        holder, key = self.places[0]
        module: nn.Module = holder[key]
        return module

    def put(self, module: nn.Module) -> None:
        """Put another module in all its places."""
        for holder, key in self.places:
            holder[key] = module


class WalkedModel:
    """A model and its sites, which stay true while modules are replaced in their places.

    Args:
        model: The model.

    Attributes:
        model: The same.
        sites: Every module below and including the model, each once, in the order of definition.

    Examples:
        >>> [site.path for site in WalkedModel(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).sites]
        ['', 'layers.0', 'layers.1']
    """

    def __init__(self, model: nn.Module) -> None:
        """Walk it.

        Raises:
            QuantizationError: It is no module.
        """
        if not isinstance(model, nn.Module):
            raise QuantizationError(f"model is a {type(model).__name__}, not an mlx.nn.Module.")
        self.model = model
        places: dict[int, list[tuple[str, Any, Any]]] = {}
        for path, holder, key in _descend("", [model], 0):
            places.setdefault(id(holder[key]), []).append((path, holder, key))
        self.sites = tuple(Site(tuple(p for p, _, _ in x), tuple((h, k) for _, h, k in x)) for x in places.values())

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Have the model compute in float32, and no more of its weights widened at a time than there is room for.

        Without a limit MLX queues ahead, and holds a float32 copy of every layer that it has queued.
        """
        with self.evaluation_mode(), self.float32_arithmetic(), memory_limit(self._limit_bytes()):
            yield

    def _limit_bytes(self) -> int:
        arrays = {id(a): a.nbytes for site in self.sites for a in own_arrays(site.module).values()}
        wanted = max(mx.get_active_memory(), sum(arrays.values())) + ROOM_BYTES
        present = mx.set_memory_limit(wanted)  # the only way to learn it
        mx.set_memory_limit(present)
        return min(wanted, present)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Evaluation mode and, where the device is a CPU, float32, which alone is fast there."""
        with ExitStack() as stack:
            stack.enter_context(self.evaluation_mode())
            if computes_on_cpu():
                stack.enter_context(self.float32_arithmetic())
            yield

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Put every module into evaluation mode, and each back into the mode that it had, with the arrays that it had.

        Some models put other arrays into themselves while they are called: mlx-lm's Gemma 3n stores a few of its
        weights anew in float32. Measuring must not leave such marks.
        """
        modules = [site.module for site in self.sites]
        # A module whose class forgets `super().__init__()`, as mlx-lm's RecurrentGemma, has no mode until it is given
        # one.
        before = [(m, m.training if has_mode(m) else True, dict(m)) for m in modules]
        with uninterrupted():
            try:
                # Set flag by flag: Module.train() of a layer with quantized inputs would requantize its weights.
                for module in modules:
                    set_mode(module, False)
                with interruptible():
                    yield
            finally:
                for module, mode, items in before:
                    set_mode(module, mode)
                    _put_back(module, items)

    @contextmanager
    def float32_arithmetic(self) -> Iterator[None]:
        """Let the model compute in float32 from its stored weights, without a copy of them.

        Embeddings hand on float32, and every operation after them takes the wider type. Where MLX's default device is a
        CPU, packed weights are unpacked for each use, in float32 from the stored scales: `mx.quantized_matmul` is tens
        of times slower there. The model's parameters and classes are what they were as soon as the block ends.
        """
        unpack = computes_on_cpu()
        stand_in = functools.cache(_stand_in)  # for this block: one that stays would keep the classes' models alive
        modules = [site.module for site in self.sites]
        pairs = ((module, stand_in(type(module), unpack and _unpackable(module))) for module in modules)
        with uninterrupted(), substituted((m, kind) for m, kind in pairs if kind is not None), interruptible():
            yield

    @property
    def unpacked_on_cpu(self) -> bool:
        """True where `float32_arithmetic` evaluates this model through unpacked weights here."""
        return computes_on_cpu() and any(_unpackable(site.module) for site in self.sites)


def _descend(path: str, holder: Any, key: Any) -> Iterator[tuple[str, Any, Any]]:
    node = holder[key]
    if isinstance(node, nn.Module):
        yield path, holder, key
    for name, child in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(child, (dict, list)):
            yield from _descend(f"{path}.{name}" if path else str(name), node, name)


@contextmanager
def in_places(modules: Iterable[tuple[Site, nn.Module]]) -> Iterator[None]:
    """Have other modules stand at some sites while the block runs."""
    modules = list(modules)
    olds = [(site, site.module) for site, _ in modules]
    with uninterrupted():
        try:
            for site, module in modules:
                site.put(module)
            with interruptible():
                yield
        finally:
            for site, old in olds:
                site.put(old)


def own_arrays(module: nn.Module) -> dict[str, mx.array]:
    """A module's parameters, those in its own lists and dictionaries included, without those of modules below it.

    Returns:
        The arrays by their dotted names below the module, in the shapes it holds them in: of a `Linear`,
        `weight` `[outputs, inputs]` and `bias` `[outputs]`.

    Examples:
        >>> list(own_arrays(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    return {name: array for key, value in module.items() if key[:1] != "_" for name, array in _arrays_in(key, value)}


def _arrays_in(name: str, value: object) -> Iterator[tuple[str, mx.array]]:
    if isinstance(value, mx.array):
        yield name, value
    elif isinstance(value, (dict, list)) and not isinstance(value, nn.Module):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _arrays_in(f"{name}.{key}", child)


def widen(values: object) -> Any:
    """Half-precision floats in a tree of arguments to float32; everything else as it is."""

    def one(value: Any) -> object:
        low = isinstance(value, mx.array) and value.dtype in _LOW
        return value.astype(mx.float32) if low else value

    return tree_map(one, values)


def _put_back(module: nn.Module, before: dict[str, object]) -> None:
    """Give a module the very items that it had; of those in place, nothing is touched."""
    if len(module) == len(before) and all(module.get(name) is value for name, value in before.items()):
        return
    dict.clear(module)
    dict.update(module, before)


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
